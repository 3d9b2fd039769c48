"""Numbers about a run that not every run wants: errors by action dimension, gradient norms, speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from librobot.frameworks.base import Framework
from librobot.frameworks.sharding import alike, norm_of
from librobot.training.callbacks.optimizer_steps import check_logged


class ActionErrors(Callback):
    """Logs `val/error/DIM`: |sampled - demonstrated| of each action dimension in its own unit, over the whole
    validation. Where the policy is for several robots it is `val/error/ROBOT/DIM`, and
    `val/action_error/ROBOT` is the mean of a robot's normalised ones, as `val/action_error` is of all.
    """

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Framework)
        shape = (
            3,
            len(pl_module.embodiments),
            pl_module.spec.action_dim,
        )  # physical, normalised, their number
        self.sums = torch.zeros(shape, dtype=torch.float64)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, Framework)
        robots = pl_module.embodiment_ids(batch.observation).cpu()
        real = outputs["real"].cpu()
        errors = [
            (outputs[f"sampled{kind}"] - outputs[f"target{kind}"]).abs() for kind in ("", "_normalized")
        ]
        for row, values in enumerate([*(error.double().cpu() for error in errors), real.double()]):
            self.sums[row].index_add_(0, robots, values.masked_fill(~real, 0.0).sum(dim=1))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Framework)
        several = (
            trainer.world_size > 1
        )  # every process then has the same numbers, which Lightning cannot know
        if several:
            device = trainer.strategy.root_device
            self.sums = trainer.strategy.reduce(self.sums.float().to(device), reduce_op="sum").double().cpu()
        robots = pl_module.embodiments
        for index, robot in enumerate(robots):
            physical, normalized, count = self.sums[:, index]
            if not count.sum():
                continue  # no sample of this robot, in any process
            place = f"/{robot.name}" if len(robots) > 1 else ""
            for dim, error, seen in zip(robot.action, physical, count, strict=False):
                pl_module.log(
                    f"val/error{place}/{dim.name}", (error / seen.clamp_min(1)).float(), sync_dist=several
                )
            if place:
                pl_module.log(
                    f"val/action_error{place}", (normalized.sum() / count.sum()).float(), sync_dist=several
                )


class GradientNorms(Callback):
    """Logs `grad_norm/PART` every `every_n_steps` optimiser steps: the norm of a part's gradients before they
    are clipped, and `grad_norm/all`. `parts` are parts or patterns; None takes the policy's own submodules.
    """

    def __init__(self, every_n_steps: int = 100, parts: Sequence[str] | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, found {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.parts = None if parts is None else tuple(parts)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_logged("callbacks.gradients", self.every_n_steps, trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        assert isinstance(pl_module, Framework)
        if (trainer.global_step + 1) % self.every_n_steps:
            return
        parts = self.parts
        if parts is None:
            parts = tuple(
                name
                for name, child in pl_module.named_children()
                if next(child.parameters(), None) is not None
            )
        for part in parts:
            if gradients := [p.grad for _, p in pl_module.named_part(part) if p.grad is not None]:
                pl_module.log(f"grad_norm/{part}", norm(gradients))
        everything = [p.grad for p in pl_module.parameters() if p.grad is not None]
        pl_module.log("grad_norm/all", norm(everything))


def norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of several tensors as one, spread over devices or not."""
    squares = [norm_of(group).square() for group in alike(gradients)]
    return torch.stack(squares).sum().sqrt()


class Throughput(Callback):
    """Logs `speed/samples_per_second`, of all devices, and `speed/data_wait`, the share of the time in which
    training waited for its next batch, since the last step that was logged.

    Validation and the saving of checkpoints count as neither. On a GPU, which works behind the process that
    feeds it, the share is of that process: data that keep up give zero, and only a GPU that is idle loses
    what is above.
    """

    def __init__(self) -> None:
        self.ended: float | None = None  # when the last step did; None where something else came between
        self.began = 0.0
        self.waited = self.worked = 0.0
        self.samples = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.began = time.perf_counter()
        if self.ended is not None:
            self.waited += self.began - self.ended

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ended = time.perf_counter()
        self.worked += self.ended - self.began
        self.samples += batch.batch_size
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        total = self.waited + self.worked
        pl_module.log("speed/samples_per_second", self.samples * trainer.world_size / total)
        pl_module.log("speed/data_wait", self.waited / total)
        self.waited = self.worked = 0.0
        self.samples = 0

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.ended = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ended = None
