"""From any source to LeRobotDataset v3.0, HDF5 or Zarr: states, actions, instructions and episodes bit for
bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from librobot.data.files import locked, write_json
from librobot.data.hdf5_writer import Hdf5Writer
from librobot.data.sources.base import Source
from librobot.data.writer import LeRobotWriter
from librobot.data.zarr_writer import ZarrWriter
from librobot.errors import LibrobotError, nearest
from librobot.progress import ProgressBar

Format = Literal["lerobot", "hdf5", "zarr"]


class EpisodeWriter(Protocol):
    """What writes a format: whole episodes, each on disk when `add_episode` returns."""

    @property
    def num_episodes(self) -> int:
        """Whole episodes on disk."""

    def add_episode(
        self, *, images: Mapping[str, np.ndarray], state: np.ndarray, action: np.ndarray, task: str
    ) -> Any: ...

    def finalize(self) -> None: ...


def convert(
    source: Source,
    target: str | Path,
    to: Format,
    *,
    video: bool = False,
    fps: int | None = None,
    prompt: str | None = None,
    show: bool = True,
) -> Path:
    """Write every episode of `source` to the new folder `target`, which appears when it is whole.

    Called again after an interruption it goes on with the next episode (the parts lie in TARGET.partial).
    video: encode pictures, for lerobot only; else every pixel is kept. fps: for lerobot,
    whose rate is a whole number, where the source's is not. prompt: instead of the source's instructions.

    Raises LibrobotError where `target` exists, the parts are of another conversion, and for episodes that
    the format cannot hold.
    """
    if to not in get_args(Format):
        raise LibrobotError(f"--to {to}: {nearest(to, get_args(Format))}")
    target = Path(target).expanduser().absolute()
    if target.exists():
        raise LibrobotError(f"{target}: exists already; name a new folder, or remove it")
    partial = target.with_name(f"{target.name}.partial")
    record = target.with_name(f"{target.name}.partial.json")
    described = {
        "source": str(source.provenance.get("root")),
        "episodes": len(source.episode_lengths),
        "frames": int(source.episode_lengths.sum()),
        "cameras": [[c.name, c.height, c.width] for c in source.spec.cameras],
        "to": to,
        "video": video,
        "prompt": prompt,
    }
    tasks = _instructions(source) if prompt is None else [prompt] * len(source.episode_lengths)
    with locked(target.with_name(f"{target.name}.lock")):
        if record.exists() and json.loads(record.read_text(encoding="utf-8")) != described:
            raise LibrobotError(f"{partial}: parts of another conversion; remove them and {record.name}")
        if partial.exists() and not record.exists():
            raise LibrobotError(f"{partial}: in the way, and not of a conversion; move it")
        write_json(record, described)
        writer = _writer(source, partial, to, video, fps)
        _write(source, writer, tasks, target, show)
        partial.rename(target)
        record.unlink()
    target.with_name(f"{target.name}.lock").unlink(missing_ok=True)
    return target


def _writer(source: Source, folder: Path, to: Format, video: bool, fps: int | None) -> EpisodeWriter:
    if to == "hdf5":
        return Hdf5Writer(folder, source.spec)
    if to == "zarr":
        return ZarrWriter(folder, source.spec)
    rate = fps if fps is not None else source.spec.control_hz
    if rate != int(rate):
        raise LibrobotError(
            f"{source.provenance.get('root')}: a LeRobotDataset's rate is a whole number of 1/s, found "
            f"{rate:g}; give --fps"
        )
    kept = ("renderer", "env")
    metadata = {key: source.provenance.get(key) for key in kept}
    return LeRobotWriter(
        folder,
        source.spec,
        fps=int(rate),
        image_format="video" if video else "image",
        metadata=metadata,
        resume=True,
    )


def _instructions(source: Source) -> list[str]:
    """One for each episode."""
    ends, tasks = np.cumsum(source.episode_lengths), []
    for episode, (end, length) in enumerate(zip(ends, source.episode_lengths, strict=True)):
        found = list(dict.fromkeys(source.prompts(np.arange(end - length, end))))
        if len(found) > 1:
            raise LibrobotError(
                f"{source.provenance.get('root')}: episode {episode} has {len(found)} instructions "
                f"({found[0]!r}, {found[1]!r}, ...), and one is written for each; give --prompt TEXT"
            )
        tasks += found
    return tasks


def _write(source: Source, writer: EpisodeWriter, tasks: list[str], target: Path, show: bool) -> None:
    ends = np.cumsum(source.episode_lengths)
    first = writer.num_episodes
    with ProgressBar(f"writing {target.name}", len(ends), show=show) as progress:
        progress.advance(first)
        for episode in range(first, len(ends)):
            rows = np.arange(ends[episode] - source.episode_lengths[episode], ends[episode])
            images = source.images(rows)
            try:
                writer.add_episode(
                    images={n: np.ascontiguousarray(i.transpose(0, 2, 3, 1)) for n, i in images.items()},
                    state=source.states(rows),
                    action=source.actions(rows),
                    task=tasks[episode],
                )
            except ValueError as error:
                place = source.provenance.get("root")
                raise LibrobotError(f"{place}: episode {episode}: {error}") from error
            progress.advance(1)
    writer.finalize()
