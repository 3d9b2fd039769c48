"""Checkpoint files: written whole or not at all, and held against the model before they are loaded."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_map

from librobot.checkpoint_path import is_sharded
from librobot.errors import LibrobotError
from librobot.frameworks.base import Framework
from librobot.frameworks.sharded_files import read_whole, shapes_of

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Listener = Callable[[Path], None]


class NotSaved(LibrobotError):
    """A checkpoint could not be written; the one before is as it was."""

    exit_code = 1


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, then renames. Lightning's own goes through the system's temporary folder,
    and a move from there to another file system is a copy, which an interruption cuts short.

    With `asynchronous` a checkpoint is copied to the CPU's memory, and a thread writes it while training goes
    on; the next one waits for it. `listeners` are called with every path that is written, in that thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asynchronous = False
        self.listeners: list[Listener] = []
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError("storage_options are not supported")
        self.wait()
        target = Path(path)
        if self.asynchronous:
            snapshot = tree_map(copied, checkpoint)
            self.start(lambda: self.write(snapshot, target))
        else:
            self.write(checkpoint, target)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        if Path(path).is_dir():
            return read_whole(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)

    def write(self, checkpoint: dict[str, Any], target: Path) -> None:
        """Raises NotSaved where the disk is full, or the file cannot be written otherwise."""
        write_file(checkpoint, target)
        self.tell(target)

    def tell(self, target: Path) -> None:
        """Tell the listeners that something is written."""
        for listener in self.listeners:
            listener(target)

    def start(self, work: Callable[[], None]) -> None:
        """Do `work` in a thread; what it raises is raised by `wait`."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Until what is being written is there. Raises what went wrong with it."""
        thread, self.thread = self.thread, None
        if thread is not None:
            thread.join()
        error, self.error = self.error, None
        if error is not None:
            raise error

    def teardown(self) -> None:
        self.wait()


def copied(value: Any) -> Any:
    """A copy on the CPU that training does not change."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def write_file(checkpoint: Mapping[str, Any], target: Path) -> None:
    """Write a checkpoint to a temporary name, then rename it. Raises NotSaved, and leaves what was there."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{target.name}.*.tmp"):  # of a process that was killed
            if left.is_file():
                left.unlink(missing_ok=True)
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
        for left in target.parent.glob(f".{target.name}.*"):  # what a link by that name pointed to
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # torch's zip writer wraps what the system says
        raise not_saved(target, error) from error
    finally:
        partial.unlink(missing_ok=True)


def not_saved(target: Path, error: BaseException) -> NotSaved:
    """What to say where a checkpoint could not be written."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno in FULL):
        cause = cause.__cause__ or cause.__context__
    reason = f"the disk is full ({cause})" if cause is not None else f"{type(error).__name__}: {error}"
    kept = "the checkpoint before stays as it was" if target.exists() else "there is no earlier one"
    return NotSaved(
        f"{target}: the checkpoint could not be written, {reason}; {kept}. Make room (callbacks.checkpoints."
        f"keep_every_n_steps keeps more than the last), then go on with the same command and ckpt=auto"
    )


def check_checkpoint(path: Path, framework: Framework) -> None:
    """Raise LibrobotError that names the tensors where the checkpoint at `path` does not fit `framework`."""
    try:
        stored = stored_weights(path)
        framework.load_weights(stored)
    except LibrobotError as error:
        raise LibrobotError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error


def stored_weights(path: Path) -> Mapping[str, Tensor]:
    """A checkpoint's weights: of a folder only their shapes, as nobody may have room for all of them."""
    if path.is_dir():
        stored = {n.partition(".")[2]: v for n, v in shapes_of(path).items() if n.startswith("weights.")}
        return {name: torch.empty(value.size, device="meta") for name, value in stored.items()}
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, KeyError) as error:
        line = (str(error).splitlines() or [""])[0]
        raise LibrobotError(
            f"{path}: expected a checkpoint of librobot; it cannot be read (cut short?): {line}"
        ) from error
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise LibrobotError(f"{path}: expected a checkpoint of librobot, found a file without a state_dict")
    return checkpoint["state_dict"]


def consolidate(checkpoint: str, output: str) -> Path:
    """Write a sharded checkpoint (or a run directory's last one) as one self-contained file."""
    found, target = Path(checkpoint), Path(output)
    for place in (found / "checkpoints" / "last.ckpt", found / "last.ckpt"):
        found = place if is_sharded(place) else found
    if not found.is_dir():
        raise LibrobotError(f"{checkpoint}: expected a sharded checkpoint (a folder); it is one file already")
    if target.exists():
        raise LibrobotError(f"{output}: exists already; name a new file")
    write_file(read_whole(found), target)
    return target
