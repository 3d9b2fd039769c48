"""Parts that begin to train later than others: a head on a backbone that stands still at first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from librobot.errors import LibrobotError
from librobot.frameworks.base import Framework


class FreezeUntil(Callback):
    """Hold parts still until an optimiser step: `until` maps parts, or patterns, to the number of steps that
    are taken without them; of overlapping parts the one named last counts, and 0 trains from the start.

    The optimiser knows all of them from the beginning, but has no gradient of those that stand still: no
    weight decay, no moments, no share of the clipped norm. On one device they take no backward pass either;
    DistributedDataParallel waits for every gradient, and there they are computed and dropped.
    """

    def __init__(self, until: Mapping[str, int]) -> None:
        for part, step in until.items():
            if step < 0:
                raise ValueError(f"until: the step of {part!r} must not be negative, found {step}")
        self.until = dict(until)
        self.waiting: dict[nn.Parameter, int] = {}  # parameter -> its step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Framework)
        steps = {p: step for part, step in self.until.items() for _, p in pl_module.named_part(part)}
        trains = [p for p in pl_module.parameters() if p.requires_grad]
        self.waiting = {p: steps[p] for p in trains if steps.get(p, 0) > trainer.global_step}
        if len(self.waiting) == len(trains):
            raise LibrobotError(
                f"callbacks.freezing: nothing is left to train at step {trainer.global_step}; leave a part "
                f"out of until, or give it 0"
            )
        if trainer.world_size == 1:
            for parameter in self.waiting:
                parameter.requires_grad_(False)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for parameter in [p for p, step in self.waiting.items() if step <= trainer.global_step]:
            del self.waiting[parameter]
            parameter.requires_grad_(True)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        for parameter in self.waiting:
            parameter.grad = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for parameter in self.waiting:
            parameter.requires_grad_(True)
        self.waiting = {}
