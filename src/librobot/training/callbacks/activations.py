"""What modules give while a policy trains: mean, spread, extremes, and the first that is not finite."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from librobot.errors import LibrobotError, nearest
from librobot.frameworks.base import Framework
from librobot.frameworks.sharding import blocks_of
from librobot.training.callbacks.guards import Diverged
from librobot.training.callbacks.optimizer_steps import OptimizerStepCallback, check_logged

NotFinite = Literal["warn", "error"]


class Activations(OptimizerStepCallback):
    """Logs, every `every_n_steps` optimiser steps, of the floating-point tensors that modules return in the
    forward passes of that step: `activations/MODULE/mean`, `std`, `max` (of the absolute values), `zeros`
    and `not_finite` (shares of the numbers). The first three are of finite numbers alone, over all processes.

    `modules` are names of modules or patterns, in which `*` stands for dots too; None takes the blocks that
    the framework and its backbone declare. A module that is not called as a whole (the last block of a
    backbone of which only keys and values are read) has no values. Where an output is not finite, the module
    that had one first is named before the weights change: by a warning, or, with `not_finite` "error", by an
    error that ends the run.

    Hooks are there in those steps' forward passes alone, in which compiled blocks run as they are without
    torch.compile; the others cost nothing.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        modules: Sequence[str] | None = None,
        not_finite: NotFinite = "warn",
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, found {every_n_steps}")
        if not_finite not in get_args(NotFinite):
            raise ValueError(f"not_finite must be one of {get_args(NotFinite)}, found {not_finite!r}")
        self.every_n_steps = every_n_steps
        self.patterns = None if modules is None else tuple(modules)
        self.not_finite = not_finite
        self.watched: dict[str, nn.Module] = {}
        self.hooks: list[RemovableHandle] = []
        self.compiled: dict[nn.Module, Any] = {}
        self.seen: dict[str, list[Tensor]] = {}  # in the order in which modules ended
        self.totals: Tensor | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Framework)
        check_logged("callbacks.activations", self.every_n_steps, trainer)
        self.watched = matching(pl_module, self.patterns)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if (trainer.global_step + 1) % self.every_n_steps:
            return
        for module in pl_module.modules():
            if module._compiled_call_impl is not None:  # which would not see hooks that come later
                self.compiled[module] = module._compiled_call_impl
                module._compiled_call_impl = None
        for name, module in self.watched.items():
            self.hooks.append(module.register_forward_hook(self.hook(name)))

    def hook(self, name: str) -> Any:
        def look(module: nn.Module, given: Any, output: Any) -> None:
            self.seen.setdefault(name, []).extend(moments(tensor) for tensor in tensors(output))

        return look

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not self.hooks:
            return
        self.stop()
        order = list(dict.fromkeys([*self.seen, *self.watched]))
        totals = self.collect(trainer, loss.device)
        self.totals = totals if self.totals is None else merged(torch.stack((self.totals, totals)))
        broken = {name: row for name, row in zip(self.watched, totals, strict=True) if row[1] > 0}
        if not broken:
            return
        name = min(broken, key=order.index)
        count, bad = (int(number) for number in broken[name][:2])
        kind, step = type(self.watched[name]).__name__, trainer.global_step + 1
        message = (
            f"callbacks.activations: of {count} numbers that {name} ({kind}) gave in step {step}, {bad} are "
            f"not finite; it is the first of {len(broken)} such modules of {len(self.watched)} that are "
            f"watched; callbacks.activations.modules=['{name}.*'] looks inside"
        )
        if self.not_finite == "error":
            raise Diverged(message)
        warnings.warn(message, stacklevel=2)

    def collect(self, trainer: Trainer, device: torch.device) -> Tensor:
        """(modules, 6) of what the hooks saw, over all processes, as `moments` has them; on the CPU."""
        own = torch.zeros(len(self.watched), 6, dtype=torch.float64)
        for row, name in enumerate(self.watched):
            if name in self.seen:
                own[row] = merged(torch.stack(self.seen[name]).cpu().double())
        self.seen = {}
        if trainer.world_size == 1:
            return own
        rows = own.new_zeros(trainer.world_size, *own.shape)
        rows[trainer.global_rank] = own
        return merged(trainer.strategy.reduce(rows.to(device), reduce_op="sum").cpu())

    def on_optimizer_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if self.totals is None:
            return
        for name, row in zip(self.watched, self.totals.tolist(), strict=True):
            count, broken, zeros, mean, squares, largest = row
            if not count:
                continue  # it was not called
            finite = max(count - broken, 1)
            found = {"mean": mean, "std": (squares / finite) ** 0.5, "max": largest}
            found |= {"zeros": zeros / count, "not_finite": broken / count}
            for kind, value in found.items():
                pl_module.log(f"activations/{name}/{kind}", value)  # the same in all processes
        self.totals = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the hooks away; compiled blocks are that again."""
        for hook in self.hooks:
            hook.remove()
        for module, call in self.compiled.items():
            module._compiled_call_impl = call
        self.hooks, self.compiled = [], {}


def matching(framework: Framework, patterns: Sequence[str] | None) -> dict[str, nn.Module]:
    """Modules by name. Raises LibrobotError for a pattern that fits none, naming the nearest."""
    if patterns is None:
        return blocks_of(framework)
    known = {name: module for name, module in framework.named_modules() if name}
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        fitting = {name: known[name] for name in fnmatch.filter(known, pattern)}
        if not fitting:
            close = [name for name in known if name.count(".") <= pattern.count(".")]
            raise LibrobotError(
                f"callbacks.activations.modules: no module of framework {type(framework).__name__} is called "
                f"{pattern!r}; {nearest(pattern, close)}"
            )
        found |= fitting
    return found


def tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a module returned, however it is packed."""
    if isinstance(output, Tensor):
        local = output.to_local() if isinstance(output, DTensor) else output
        if local.is_floating_point() and local.numel():
            yield local
    elif isinstance(output, dict):
        for item in output.values():
            yield from tensors(item)
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from tensors(item)
    elif is_dataclass(output):
        for part in fields(output):
            yield from tensors(getattr(output, part.name))


@torch.no_grad()
def moments(x: Tensor) -> Tensor:
    """(6,) float32 on the device: how many numbers, not finite ones, zeros; of the finite ones their mean,
    the sum of squared distances from it, and the largest absolute value."""
    x = x.detach().float()
    finite = x.isfinite()
    kept = x.masked_fill(~finite, 0.0)
    count = finite.sum()
    mean = kept.sum() / count.clamp_min(1)
    squares = (kept - mean).masked_fill(~finite, 0.0).square().sum()
    numbers = torch.full_like(mean, x.numel())
    return torch.stack((numbers, (~finite).sum(), (x == 0).sum(), mean, squares, kept.abs().max()))


def merged(parts: Tensor) -> Tensor:
    """Of the `moments` of parts (n, ..., 6) those of all (Chan et al. 1979)."""
    count, broken, zeros, mean, squares, largest = parts.unbind(-1)
    finite = count - broken
    total = finite.sum(0)
    middle = (finite * mean).sum(0) / total.clamp_min(1)
    spread = (squares + finite * (mean - middle).square()).sum(0)
    return torch.stack((count.sum(0), broken.sum(0), zeros.sum(0), middle, spread, largest.amax(0)), dim=-1)
