"""Where a checkpoint is, without reading it: commands ask before they import what reads it."""

from __future__ import annotations

from pathlib import Path

from librobot.errors import LibrobotError

REST = "rest.pt"
"""What a sharded checkpoint, a folder, holds beside its tensors."""


def is_sharded(path: Path) -> bool:
    """Whether a path is such a folder, and a whole one: `.metadata` is written last."""
    return (path / ".metadata").is_file() and (path / REST).is_file()


def checkpoint_file(path: str | Path) -> Path:
    """The file itself (or the folder of a sharded checkpoint), or a run directory's last checkpoint. Raises
    LibrobotError where there is none."""
    path = Path(path)
    if path.is_file() or is_sharded(path):
        return path
    places = [path / "checkpoints" / "last.ckpt", path / "last.ckpt"]
    for place in places:
        if place.is_file() or is_sharded(place):
            return place
    wanted = "neither a file nor a folder is there"
    if path.is_dir():
        wanted = f"the folder holds none of {', '.join(str(place.relative_to(path)) for place in places)}"
    raise LibrobotError(f"no checkpoint at {path}: expected one or a run directory that holds one; {wanted}")
