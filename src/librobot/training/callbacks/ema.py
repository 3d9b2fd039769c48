"""An exponential moving average of the weights: what validation measures and what the policy acts with.

Lightning's EMAWeightAveraging copies the whole module, frozen backbone included, and averages in the weights'
own dtype, where bfloat16 rounds a decay of 0.999 away; hence this one.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from librobot.errors import LibrobotError
from librobot.frameworks.checkpoint import AVERAGE
from librobot.frameworks.sharding import full, mesh_of, reshard, spread_like
from librobot.training.callbacks.optimizer_steps import OptimizerStepCallback
from librobot.training.strategies import keeps_parts


class EMA(OptimizerStepCallback):
    """average <- d average + (1 - d) weights, in float32, for all parameters that train.

    With `power` the decay d warms up as in Diffusion Policy (Chi et al. 2023, the published EMAModel): update
    number n takes d = min(`decay`, 1 - n ** -power) where n counts from 0 at the second update, so that the
    first two copy the weights. `power` None takes `decay` at once. There is an update every `every_n_steps`
    optimiser steps behind `start_step`; until then the average is the weights. Buffers, such as a batch
    norm's running statistics, are not averaged: policies take the trained ones.

    A checkpoint holds both: `state_dict` stays what training goes on with, and `policy` says which of the two
    `Policy.from_checkpoint` loads.
    """

    def __init__(
        self,
        decay: float = 0.9999,
        power: float | None = 0.75,
        every_n_steps: int = 1,
        start_step: int = 0,
        policy: Literal["average", "trained"] = "average",
    ) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must lie in [0, 1], found {decay}")
        if power is not None and power <= 0:
            raise ValueError(f"power must be above 0, or null for a constant decay, found {power}")
        if every_n_steps < 1 or start_step < 0:
            raise ValueError("every_n_steps must be at least 1 and start_step at least 0")
        if policy not in ("average", "trained"):
            raise ValueError(f"policy must be average or trained, found {policy!r}")
        self.decay = decay
        self.power = power
        self.every_n_steps = every_n_steps
        self.start_step = start_step
        self.policy = policy
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self.trained: dict[str, Tensor] = {}  # the weights, while the average stands in their place

    def decay_of(self, update: int) -> float:
        """d of update number `update`, counted from 0."""
        if self.power is None:
            return self.decay
        return min(self.decay, 1.0 - max(1, update) ** -self.power)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise LibrobotError(
                f"callbacks.ema: {type(trainer.strategy).__name__} flattens the parameters, and the average "
                f"needs them by name; take trainer=fsdp2 or trainer=ddp, or leave ema out of callbacks"
            )

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = dict(pl_module.named_parameters())
        for name, average in self.average.items():  # a checkpoint's
            self.average[name] = alike(average, parameters[name])
        self.follow(pl_module)

    def follow(self, pl_module: LightningModule) -> list[str]:
        """Begin an average for what trains and has none yet; the names of all that have one."""
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad and name not in self.average:
                self.average[name] = parameter.detach().to(torch.float32, copy=True)
        return list(self.average)

    def on_optimizer_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        past = step - self.start_step
        if past > 0 and past % self.every_n_steps == 0:
            self.update(pl_module, self.decay_of(self.updates))
            self.updates += 1
        elif past <= 0:
            self.update(pl_module, 0.0)

    @torch.no_grad()
    def update(self, pl_module: LightningModule, decay: float) -> None:
        """One step of the average."""
        parameters = dict(pl_module.named_parameters())
        names = self.follow(pl_module)
        groups: dict[Any, list[str]] = {}  # kernels over many tensors take only tensors that are spread alike
        for name in names:
            groups.setdefault(mesh_of(parameters[name]), []).append(name)
        for own in groups.values():
            weights: Any = [parameters[name].detach().float() for name in own]
            get_ema_multi_avg_fn(decay)([self.average[name] for name in own], weights, None)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.put_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.take_out(pl_module)

    @torch.no_grad()
    def put_in(self, pl_module: LightningModule) -> None:
        """Put the average in the weights' place, until `take_out`."""
        reshard(pl_module)
        parameters = dict(pl_module.named_parameters())
        for name, average in self.average.items():
            self.trained[name] = parameters[name].detach().clone()
            parameters[name].copy_(average)

    @torch.no_grad()
    def take_out(self, pl_module: LightningModule) -> None:
        """Put the trained weights back."""
        reshard(pl_module)
        parameters = dict(pl_module.named_parameters())
        for name, weights in self.trained.items():
            parameters[name].copy_(weights)
        self.trained = {}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.trained:  # never the case with the callbacks here: Lightning runs those that save last
            raise LibrobotError("callbacks.ema: a checkpoint cannot be saved in the middle of a validation")
        in_parts = keeps_parts(trainer.strategy)
        whole = {name: average if in_parts else full(average) for name, average in self.average.items()}
        checkpoint[AVERAGE] = {"weights": whole, "acts": self.policy == "average", "updates": self.updates}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        stored = checkpoint.get(AVERAGE)  # a run that began without an average begins one here
        if stored is None:
            return
        known = dict(pl_module.named_parameters())
        if unknown := sorted(set(stored["weights"]) - set(known)):
            raise LibrobotError(
                f"callbacks.ema: the checkpoint averages {unknown[0]}, which the policy lacks"
            )
        self.average, self.updates = dict(stored["weights"]), int(stored["updates"])


def alike(tensor: Tensor, parameter: Tensor) -> Tensor:
    """`tensor` in float32, where and how `parameter` is stored."""
    moved = tensor.to(parameter.device, torch.float32, copy=True)
    if isinstance(parameter, DTensor) and not isinstance(moved, DTensor):
        return spread_like(moved, parameter)
    return moved
