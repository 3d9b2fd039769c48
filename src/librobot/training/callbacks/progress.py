"""How far training is, how fast it goes and how long it will still take."""

from __future__ import annotations

import math
import sys
import time
from datetime import timedelta
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import TaskID as Task


class TrainingProgress(ProgressBar):
    """A bar over the optimiser steps in a terminal; elsewhere a line every `every_n_seconds`.

    Both show the step, the loss, steps per second and an estimate of the remaining time.
    """

    def __init__(self, every_n_seconds: float = 10.0) -> None:
        super().__init__()
        if every_n_seconds <= 0:
            raise ValueError(f"every_n_seconds must be above 0, found {every_n_seconds}")
        self.every_n_seconds = every_n_seconds
        self.enabled = True
        self.bar: Progress | None = None
        self.task: Task | None = None
        self.total = math.inf
        self.first_step = 0
        self.started = 0.0
        self.spoke = 0.0

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.total = float(trainer.estimated_stepping_batches)
        self.first_step = trainer.global_step
        self.started = self.spoke = time.monotonic()
        if self.enabled and sys.stdout.isatty():
            columns = (
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self.bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), refresh_per_second=4)
            total = self.total if math.isfinite(self.total) else None
            self.task = self.bar.add_task("train", total=total, completed=self.first_step, note="")
            self.bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        pause = 0.5 if self.bar else self.every_n_seconds
        is_last = trainer.global_step >= self.total
        if self.enabled and (is_last or now - self.spoke >= pause):
            self.spoke = now
            self.show(trainer.global_step, loss_of(outputs), now - self.started)

    def show(self, step: int, loss: float | None, elapsed: float) -> None:
        """Bring the bar up to date, or print a line; `elapsed` is in seconds."""
        speed = (step - self.first_step) / max(elapsed, 1e-9)
        note = f"loss {loss:.4g}, {speed:.3g} steps/s" if loss is not None else f"{speed:.3g} steps/s"
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step, note=note)
            return
        if math.isfinite(self.total):
            left = timedelta(seconds=round((self.total - step) / max(speed, 1e-9)))
            print(f"step {step}/{self.total:.0f}, {note}, {left} left", flush=True)
        else:
            print(f"step {step}, {note}", flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled and not trainer.sanity_checking:
            names = sorted(name for name in trainer.callback_metrics if name.startswith("val"))
            values = ", ".join(f"{name} {float(trainer.callback_metrics[name]):.4g}" for name in names)
            if values:
                self.print(f"step {trainer.global_step}: {values}")

    def print(self, *arguments: Any, **options: Any) -> None:
        """Print above the bar."""
        text = " ".join(str(item) for item in arguments)
        if self.bar is not None:
            self.bar.console.print(text, markup=False)
        elif self.enabled:
            print(text, flush=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def loss_of(outputs: Any) -> float | None:
    """The loss of a training step; reading it waits for the device, so only now and then."""
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    return None if loss is None else float(loss)
