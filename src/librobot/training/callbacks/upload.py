"""Checkpoints to another place as soon as they are written: a bucket, another machine, a folder."""

from __future__ import annotations

import threading
import time
import warnings
from pathlib import Path
from queue import Queue
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from librobot.errors import LibrobotError
from librobot.training.callbacks.checkpoints import settle
from librobot.training.checkpoints import AtomicCheckpointIO

HINT = "the address's protocol needs its package (s3://: s3fs, gs://: gcsfs, sftp://: paramiko)"


class Upload(Callback):
    """Copy every checkpoint below `address`, an fsspec URL such as s3://bucket/run or file:///mnt/run, while
    training goes on.

    Of a name that is written more often than it can be sent only the newest goes. A file arrives under a
    temporary name and is then renamed. What cannot be sent after `attempts` tries is said, and stays on this
    machine; training never ends because of it. The end of training waits for what is on its way.
    """

    def __init__(self, address: str, attempts: int = 3, pause_seconds: float = 10.0) -> None:
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1, found {attempts}")
        self.address, self.attempts, self.pause_seconds = address, attempts, pause_seconds
        self.fs: Any = None
        self.root = ""
        self.waiting: Queue[Path | None] = Queue()
        self.newest: dict[Path, int] = {}  # path -> how often it was written
        self.thread: threading.Thread | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        io = trainer.strategy.checkpoint_io
        if not trainer.is_global_zero or self.thread is not None:
            return
        if not isinstance(io, AtomicCheckpointIO):
            raise LibrobotError(
                f"callbacks.upload: {type(trainer.strategy).__name__} writes checkpoints itself"
            )
        from fsspec.core import url_to_fs

        try:
            self.fs, self.root = url_to_fs(self.address)
            self.fs.makedirs(self.root, exist_ok=True)
        except (ImportError, ValueError, OSError) as error:
            raise LibrobotError(f"callbacks.upload.address={self.address}: {error}; {HINT}") from error
        io.listeners.append(self.wrote)
        self.thread = threading.Thread(target=self.work, name="upload", daemon=True)
        self.thread.start()

    def wrote(self, path: Path) -> None:
        """A checkpoint is there."""
        self.newest[path] = self.newest.get(path, 0) + 1
        self.waiting.put(path)

    def work(self) -> None:
        while (path := self.waiting.get()) is not None:
            number = self.newest.pop(path, None)
            if number is not None:  # else what was sent last is newer already
                self.send(path)

    def send(self, path: Path) -> None:
        """Send one checkpoint, with several attempts."""
        for attempt in range(1, self.attempts + 1):
            try:
                self.copy(path)
                return
            except Exception as error:
                if attempt == self.attempts:
                    warnings.warn(
                        f"{path} could not be sent to {self.address} ({type(error).__name__}: {error}); it "
                        f"stays here, and the next checkpoint is tried again",
                        stacklevel=2,
                    )
                else:
                    time.sleep(self.pause_seconds)

    def copy(self, path: Path) -> None:
        target, partial = f"{self.root}/{path.name}", f"{self.root}/.{path.name}.part"
        is_folder = path.is_dir()
        if self.fs.exists(partial):
            self.fs.rm(partial, recursive=True)
        if is_folder:  # a link to it, where it is a sharded one
            self.fs.makedirs(partial, exist_ok=True)
            for file in sorted(path.resolve().rglob("*")):
                self.fs.put_file(str(file), f"{partial}/{file.name}")
        else:
            self.fs.put_file(str(path), partial)
        if self.fs.exists(target) and (is_folder or self.fs.isdir(target)):
            self.fs.rm(target, recursive=True)
        self.fs.mv(partial, target, recursive=is_folder)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        thread, self.thread = self.thread, None
        if thread is not None:
            settle(trainer)
            self.waiting.put(None)
            thread.join()
