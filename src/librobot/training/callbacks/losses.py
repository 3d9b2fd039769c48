"""What the training loss is made of: by action dimension, by dataset, by robot."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from librobot.data.sources.base import Mixture
from librobot.frameworks.base import Framework
from librobot.losses import Record, recorded
from librobot.training.callbacks.optimizer_steps import OptimizerStepCallback, check_logged


class LossParts(OptimizerStepCallback):
    """Logs every `every_n_steps` optimiser steps, each the mean since it was logged last (or since the run
    went on), over all processes:

    - `train/dim_loss/DIM`: what the head makes the mean of, of one action dimension alone, before
      `dim_weights`: squared errors of velocities or noise (flow, diffusion), absolute or squared ones of
      normalised actions (`l1`, `mse`, `cvae`), nats (tokens that stand for one number each, as bins do).
      `train/dim_loss/ROBOT/DIM` where the policy is for several robots.
    - `train/dataset_loss/NAME`: the loss of the samples of a mixture's dataset.
    - `train/robot_loss/ROBOT`: that of a robot's samples, where they are several.

    The losses of datasets and robots are of actions alone: what a framework adds for a whole batch (a KL
    divergence, answers to questions) is in none of them. A head whose loss is no mean over numbers (a
    mixture's density of whole chunks, tokens that mix numbers) has no dimensions to tell apart, which is said
    once. No pass is computed for this, and the device is waited for in the steps that are logged alone.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, found {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.record = Record()
        self.recording: AbstractContextManager[None] | None = None
        self.said = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Framework)
        check_logged("callbacks.losses", self.every_n_steps, trainer)
        source = getattr(getattr(trainer, "datamodule", None), "source", None)
        self.datasets = tuple(source.names) if isinstance(source, Mixture) else ()
        # Sums, and what they are divided by: of each robot's dimensions, of each robot, of each dataset.
        robots, dims = len(pl_module.embodiments), pl_module.spec.action_dim
        sizes = {"dims": (2, robots, dims), "robots": (2, robots), "datasets": (2, len(self.datasets))}
        self.sums = {
            name: torch.zeros(size, device=trainer.strategy.root_device) for name, size in sizes.items()
        }

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.record = Record()
        self.recording = recorded(self.record)
        self.recording.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Framework)
        self.stop()
        robots = pl_module.embodiment_ids(batch.observation)
        for error, real in self.record.elements:
            for row, values in enumerate((error, real.float())):
                self.sums["dims"][row].index_add_(0, robots, pl_module.of_dimensions(values).sum(dim=1))
        groups = {"robots": robots}
        if self.datasets:
            groups["datasets"] = torch.as_tensor(batch.extra["dataset"]).to(robots)
        for sample in self.record.samples:
            for name, numbers in groups.items():
                for row, values in enumerate(sample):
                    self.sums[name][row].index_add_(0, numbers, values)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.stop()

    def stop(self) -> None:
        if self.recording is not None:
            self.recording.__exit__(None, None, None)
            self.recording = None

    def on_optimizer_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        assert isinstance(pl_module, Framework)
        if step % self.every_n_steps:
            return
        means = self.means(trainer)
        robots = pl_module.embodiments
        found: dict[str, float | None] = {}
        for robot, values in zip(robots, means["dims"], strict=True):
            place = f"/{robot.name}" if len(robots) > 1 else ""
            for dim, value in zip(robot.action, values, strict=False):
                found[f"train/dim_loss{place}/{dim.name}"] = value
        if all(value is None for value in found.values()) and not self.said:
            self.said = True
            warnings.warn(
                f"callbacks.losses: the loss of head {type(pl_module.head).__name__} is no mean over numbers "
                f"of the actions, so that there is no train/dim_loss to log",
                stacklevel=2,
            )
        if len(robots) > 1:
            names = [f"train/robot_loss/{robot.name}" for robot in robots]
            found |= zip(names, means["robots"], strict=True)
        found |= zip((f"train/dataset_loss/{name}" for name in self.datasets), means["datasets"], strict=True)
        for name, value in found.items():
            if value is not None:
                pl_module.log(name, value)  # the same in all processes

    def means(self, trainer: Trainer) -> dict[str, Any]:
        """Means over all processes since the last call, as nested lists; None where nothing was seen."""
        flat = torch.cat([sums.flatten() for sums in self.sums.values()])
        whole = trainer.strategy.reduce(flat, reduce_op="sum").cpu()  # the one wait for the device
        found = {}
        for (name, sums), part in zip(
            self.sums.items(), whole.split([sums.numel() for sums in self.sums.values()]), strict=True
        ):
            found[name] = listed(*part.view(sums.shape).unbind())
            sums.zero_()
        return found


def listed(total: Tensor, divisor: Tensor) -> Any:
    """Quotients as nested lists, None where they are of nothing."""
    if total.ndim > 1:
        return [listed(*pair) for pair in zip(total, divisor, strict=True)]
    pairs = zip(total.tolist(), divisor.tolist(), strict=True)
    return [value / count if count > 0 else None for value, count in pairs]
