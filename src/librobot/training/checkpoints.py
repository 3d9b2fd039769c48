"""Checkpoint files: written whole or not at all, and held against the model before they are loaded."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from librobot.errors import LibrobotError
from librobot.frameworks.base import Framework


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, then renames. Lightning's own goes through the system's temporary folder,
    and a move from there to another file system is a copy, which an interruption cuts short."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError("storage_options are not supported")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            torch.save(checkpoint, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def check_checkpoint(path: Path, framework: Framework) -> None:
    """Raise LibrobotError that names the tensors where the checkpoint at `path` does not fit `framework`.

    Folders (sharded checkpoints) are left to their strategy.
    """
    if path.is_dir():
        return
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, KeyError) as error:
        line = (str(error).splitlines() or [""])[0]
        raise LibrobotError(
            f"{path}: expected a checkpoint of librobot; it cannot be read (cut short?): {line}"
        ) from error
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise LibrobotError(f"{path}: expected a checkpoint of librobot, found a file without a state_dict")
    try:
        framework.load_weights(checkpoint["state_dict"])
    except LibrobotError as error:
        raise LibrobotError(f"{path}: {error}") from error
