"""lerobot's checkpoints, both ways: one module for each policy type, named as in its config.json."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

from librobot.checkpoint_path import checkpoint_file
from librobot.errors import LibrobotError, nearest
from librobot.interchange.base import Imported, ImportOptions
from librobot.interchange.lerobot.folder import LeRobotFolder, write_folder
from librobot.policy import Policy

HELPERS = ("folder", "relative")

WRITERS = {
    "ACT": "act",
    "DiffusionPolicy": "diffusion",
    "Pi0": "pi0",
    "Pi05": "pi05",
    "Pi0FAST": "pi0_fast",
    "SmolVLA": "smolvla",
    "Groot": "groot",
}
"""Framework class -> policy type."""


def fits(folder: Path) -> bool:
    return LeRobotFolder.fits(folder)


def read(folder: Path, options: ImportOptions) -> Imported:
    opened = LeRobotFolder(folder)
    return policy_module(opened.type, folder).read(opened, options)


def export_checkpoint(checkpoint: str | Path, output: str | Path) -> Path:
    """Write the policy of `checkpoint` as a folder that lerobot's `from_pretrained` loads; returns it.

    Raises LibrobotError for a framework that lerobot does not have, and where the folder is not empty.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise LibrobotError(f"{output}: expected a new or an empty folder, found files; name another")
    path = checkpoint_file(checkpoint)
    policy = Policy.from_checkpoint(path, device="cpu")
    name = type(policy.framework).__name__
    module: Any = policy_module(WRITERS[name], path) if name in WRITERS else None
    if policy.framework.robots.representation is not None and not hasattr(module, "RELATIVE"):
        raise LibrobotError(
            f"{path}: the policy was trained with actions= other than absolute, and lerobot would take its "
            f"actions for the robot's own"
        )
    if not hasattr(module, "write"):
        raise LibrobotError(
            f"{path}: lerobot has no policy for framework {name}; it has those of {', '.join(WRITERS)}"
        )
    write_folder(module.write(policy), policy, output)
    return output


def policy_module(name: str, place: Path) -> Any:
    """The module of a policy type. Raises LibrobotError for one that we do not know."""
    known = [info.name for info in pkgutil.iter_modules(__path__) if info.name not in HELPERS]
    if name not in known:
        raise LibrobotError(
            f"{place}: a policy of lerobot's type {name!r} cannot be read; {nearest(name, known)}"
        )
    return importlib.import_module(f"{__name__}.{name}")
