"""Stop a run whose loss is not a number, and log the learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from librobot.errors import LibrobotError


class Diverged(LibrobotError):
    """Training produced a loss, or on the way to it an output, that is not finite."""

    exit_code = 1


class StopOnNaN(Callback):
    """Stop with an error that names the step when the loss is not finite.

    Reading a loss makes the CPU wait for the GPU: there, losses are looked at in groups of `every_n_steps`.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, found {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.waiting: list[tuple[int, torch.Tensor]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if not isinstance(loss, torch.Tensor):
            return
        self.waiting.append((trainer.global_step, loss.detach()))
        if loss.device.type == "cpu" or len(self.waiting) >= self.every_n_steps:
            self.look()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.look()  # a checkpoint never holds weights that follow a broken loss

    def look(self) -> None:
        """Raise Diverged for the first loss among those waiting that is not finite."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        values = torch.stack([loss.float().mean() for _, loss in waiting]).tolist()
        for (step, _), value in zip(waiting, values, strict=True):
            if not math.isfinite(value):
                raise Diverged(
                    f"the loss is {value} at step {step}; the last checkpoint is from before. Try a smaller "
                    f"optim.lr, trainer.gradient_clip_val=1, or find the operation with debug=anomaly"
                )


class LogLearningRate(Callback):
    """Log the learning rate of each optimiser group, in the steps that are logged at all: as `lr`, or as
    `lr/<group>` where there are several."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.global_step + 1) % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return  # Lightning would throw the value away
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if len(groups) == 1:
            pl_module.log("lr", groups[0]["lr"])
            return
        for index, group in enumerate(groups):
            pl_module.log(f"lr/{group.get('name', index)}", group["lr"])
