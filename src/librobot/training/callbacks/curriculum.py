"""What a policy learns first: near actions, some datasets, easy tasks; by step."""

from __future__ import annotations

import bisect
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from librobot.data.datamodule import DataModule
from librobot.data.sources.base import Mixture, Source
from librobot.data.step_order import StepOrder
from librobot.errors import LibrobotError, nearest
from librobot.frameworks.base import Framework
from librobot.types import Batch


@dataclass(frozen=True)
class Stage:
    """Until optimiser step `until` only samples are seen whose instruction fits one of the patterns
    `prompts`, whose dataset is among `datasets`, and whose episode has at most `max_length` steps; None
    admits all."""

    until: int
    prompts: Sequence[str] | None = None
    datasets: Sequence[str] | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.until < 1:
            raise ValueError(f"tasks: until must be at least 1, found {self.until}")
        if self.prompts is None and self.datasets is None and self.max_length is None:
            raise ValueError("tasks: a stage needs prompts, datasets or max_length, found none of them")


class Curriculum(Callback):
    """All by optimiser step, so that a resumed run goes on exactly.

    horizon: {step: number}: from that step on, so many actions of a chunk count in the loss, from the current
    one on (None: all). Logged as `curriculum/horizon`. weights: {step: {dataset: weight}}: shares of a
    mixture's datasets in every batch, in place of its own, linear between the steps. tasks: stages, each
    {"until", "prompts", "datasets", "max_length"}; at a step the first that is not over counts, and after
    the last everything is seen.

    With weights or tasks an epoch is a number of samples, no longer each of them once.
    """

    def __init__(
        self,
        horizon: Mapping[int, int | None] | None = None,
        weights: Mapping[int, Mapping[str, float]] | None = None,
        tasks: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.horizon = {int(step): value for step, value in sorted((horizon or {}).items())}
        self.weights = {int(step): dict(value) for step, value in sorted((weights or {}).items())}
        try:
            self.stages = sorted((Stage(**stage) for stage in tasks), key=lambda stage: stage.until)
        except TypeError as error:
            raise ValueError(f"tasks: expected until, prompts, datasets, max_length: {error}") from error
        if not (self.horizon or self.weights or self.stages):
            raise ValueError("a curriculum needs horizon, weights or tasks, found none of them")
        for step, value in self.horizon.items():
            if step < 0 or (value is not None and value < 1):
                raise ValueError(f"horizon: steps from 0 and numbers from 1 on, found {step}: {value}")
        if self.weights and (0 not in self.weights or min(self.weights) < 0):
            raise ValueError(f"weights: the first step must be 0, found {min(self.weights)}")

    # The data.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not (self.weights or self.stages):
            return
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, DataModule):
            raise LibrobotError("callbacks.curriculum: weights and tasks need librobot's data module")
        accumulate: int = trainer.accumulate_grad_batches

        def order(source: Source, rows: Int[np.ndarray, " n"], seed: int, batch: int) -> StepOrder:
            groups, shares = self.groups(source, rows)
            devices = batch // data.batch_size
            used = len(rows) // batch * batch if data.drop_last else len(rows) // devices * devices
            batches = within(trainer.limit_train_batches, -(-used // batch))
            return StepOrder(groups, shares, seed=seed, batch=batch, accumulate=accumulate, batches=batches)

        data.make_order = order

    def groups(self, source: Source, rows: Int[np.ndarray, " n"]) -> tuple[list[np.ndarray], Any]:
        """The samples that are always treated alike, and the share of each such group by step.

        Raises LibrobotError for names that the mixture lacks, and where a step has nothing to train on.
        """
        names = source.names if isinstance(source, Mixture) else ("dataset",)
        dataset = source.dataset(rows) if isinstance(source, Mixture) else np.zeros(len(rows), np.int64)
        self.check(names)
        admitted = np.stack(
            [self.admits(stage, source, rows, dataset, names) for stage in self.stages]
            or [np.ones(len(rows), bool)]
        )
        keys, group_of = np.unique(np.vstack([dataset, admitted]), axis=1, return_inverse=True)
        group_of = group_of.reshape(-1)
        groups = [np.flatnonzero(group_of == i) for i in range(keys.shape[1])]
        sizes = np.array([len(group) for group in groups], np.float64)
        own = source.shares if isinstance(source, Mixture) else np.ones(1)

        def shares(step: int) -> Float[np.ndarray, " g"]:
            number = bisect.bisect_right([stage.until for stage in self.stages], step)
            seen = keys[1 + number] if number < len(self.stages) else np.ones(len(sizes))
            left = sizes * seen
            inside = np.bincount(keys[0], weights=left, minlength=len(names))
            weight = self.weights_at(step, names, own)
            share = weight[keys[0]] * left / np.where(inside > 0, inside, 1.0)[keys[0]]
            if not share.sum():
                raise LibrobotError(
                    f"callbacks.curriculum: no sample is left to train on at step {step}; widen "
                    f"{self.stages[number] if number < len(self.stages) else 'weights'}"
                )
            return share / share.sum()

        for step in {0, *self.weights, *(stage.until for stage in self.stages)}:
            shares(step)  # said before training, not in its middle
        return groups, shares

    def check(self, names: Sequence[str]) -> None:
        for step, weights in self.weights.items():
            for name, value in weights.items():
                if name not in names:
                    raise LibrobotError(f"callbacks.curriculum.weights.{step}.{name}: {nearest(name, names)}")
                if value < 0:
                    raise LibrobotError(
                        f"callbacks.curriculum.weights.{step}.{name} must be at least 0, found {value}"
                    )
        for stage in self.stages:
            for name in stage.datasets or ():
                if name not in names:
                    raise LibrobotError(f"callbacks.curriculum.tasks.datasets: {nearest(name, names)}")

    def admits(
        self, stage: Stage, source: Source, rows: np.ndarray, dataset: np.ndarray, names: Sequence[str]
    ) -> Bool[np.ndarray, " n"]:
        """Which samples a stage shows."""
        admitted = np.ones(len(rows), bool)
        episode = np.searchsorted(np.cumsum(source.episode_lengths), rows, side="right")
        if stage.max_length is not None:
            admitted &= np.asarray(source.episode_lengths)[episode] <= stage.max_length
        if stage.datasets is not None:
            admitted &= np.isin(dataset, [names.index(name) for name in stage.datasets])
        if stage.prompts is not None:
            prompts = source.prompts(rows)
            fits = {
                prompt: any(fnmatch.fnmatch(prompt, pattern) for pattern in stage.prompts)
                for prompt in set(prompts)
            }
            admitted &= np.array([fits[prompt] for prompt in prompts])
        return admitted

    def weights_at(
        self, step: int, names: Sequence[str], own: Float[np.ndarray, " d"]
    ) -> Float[np.ndarray, " d"]:
        if not self.weights:
            return own
        steps = list(self.weights)
        each = [np.interp(step, steps, [self.weights[s].get(name, 0.0) for s in steps]) for name in names]
        return np.array(each)

    # The loss.

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if not self.horizon:
            return
        assert isinstance(pl_module, Framework)
        count = self.horizon_at(trainer.global_step)
        length = batch.action_mask.shape[1]
        count = length + pl_module.action_offset if count is None else count
        near = torch.arange(length, device=batch.action_mask.device) < count - pl_module.action_offset
        batch.action_mask = batch.action_mask & near
        pl_module.log("curriculum/horizon", float(min(count, length + pl_module.action_offset)))

    def horizon_at(self, step: int) -> int | None:
        """Actions that count at a step; None for all."""
        known = [first for first in self.horizon if first <= step]
        return self.horizon[known[-1]] if known else None


def within(limit: int | float, batches: int) -> int:
    """Of an epoch's batches those that a trainer's `limit_train_batches` leaves: a number, or a share."""
    return min(limit, batches) if isinstance(limit, int) else int(limit * batches)
