"""What is to happen after an optimiser step, whatever number of batches it takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from librobot.errors import LibrobotError


class OptimizerStepCallback(Callback, ABC):
    """Calls `on_optimizer_step_end` at the end of a batch that stepped, not while gradients accumulate."""

    step_before = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self.step_before:
            self.on_optimizer_step_end(trainer, pl_module, trainer.global_step)

    @abstractmethod
    def on_optimizer_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """`step` optimiser steps are done."""


def check_logged(place: str, every_n_steps: int, trainer: Trainer) -> None:
    """Raise LibrobotError where a callback at `place` would log in steps that the loggers do not see."""
    logged: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if every_n_steps % logged:
        raise LibrobotError(
            f"{place}.every_n_steps must be a multiple of trainer.log_every_n_steps ({logged}), the steps "
            f"that are logged at all, found {every_n_steps}"
        )
