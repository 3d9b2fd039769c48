"""One training step on fake tensors: what it keeps in memory, and how much it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from librobot.frameworks.base import Framework
from librobot.training.estimates.ledger import Ledger, num_bytes
from librobot.types import Batch

Optimizer = torch.optim.Optimizer
MIN_8BIT, BLOCK_8BIT = 4096, 256


@dataclass(frozen=True)
class StepCost:
    """Bytes of a step on one device that holds everything, and operations of an optimiser step.

    `activations` are what the forward pass leaves for the backward pass; `peak` the most that lives at any
    moment of a later step, when optimiser state and the last step's gradients are there.
    """

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    batch: int
    peak: int
    flops: int
    recomputed: int
    block: int
    """Bytes of the largest of the backbone's blocks."""


def step_cost(
    framework: Framework,
    batch: Batch,
    make_optimizer: Callable[[list[dict[str, Any]]], Optimizer],
    *,
    precision: str = "32-true",
    accumulate: int = 1,
    clip: float | None = None,
    augment: Callable[[Batch], Batch] | None = None,
    state_bytes: Callable[[Tensor], int] | None = None,
) -> StepCost:
    """Two steps in Lightning's order: forward, then old gradients away, backward, clip, step.

    `state_bytes` gives the optimiser state of a parameter, for an optimiser that cannot run on fake tensors.
    """
    dtype = half_of(precision)
    if dtype is not None and precision.endswith("-true"):
        convert(framework, dtype)
    mixed = dtype is not None and precision.endswith("-mixed")
    trained = [p for p in framework.parameters() if p.requires_grad]
    optimizer = make_optimizer(framework.param_groups(framework, {})) if state_bytes is None else None
    ledger = Ledger()
    ledger.add([*framework.parameters(), *framework.buffers(), *tensors_of(batch)])
    reserved = 0 if state_bytes is None else sum(state_bytes(p) for p in trained)

    def one_pass(first: bool) -> int:
        before = ledger.live
        with torch.autocast("cpu", dtype) if mixed else nullcontext():
            loss, _ = framework.compute_loss(batch if augment is None else augment(batch))
        kept = ledger.live - before
        if first:
            framework.zero_grad(set_to_none=True)
        (loss / accumulate).backward()
        return kept

    activations = flops = recomputed = 0
    with ledger, seeded():
        for _ in range(2):
            ledger.reset_peak()
            start, again = ledger.flops, ledger.recomputed
            for micro in range(min(accumulate, 2)):
                activations = max(activations, one_pass(first=micro == 0))
            if clip is not None:
                nn.utils.clip_grad_norm_(trained, clip)
            if optimizer is not None:
                optimizer.step()
            flops, recomputed = ledger.flops - start, ledger.recomputed - again
    passes = min(accumulate, 2)
    state = {} if optimizer is None else optimizer.state
    blocks = [num_bytes(block.parameters()) for block in getattr(framework.vlm, "blocks", ())]
    return StepCost(
        parameters=sum(p.numel() for p in framework.parameters()),
        trainable=sum(p.numel() for p in trained),
        weights=num_bytes([*framework.parameters(), *framework.buffers()]),
        gradients=num_bytes(p.grad for p in trained if p.grad is not None),
        optimizer=reserved
        + num_bytes(x for own in state.values() for x in own.values() if isinstance(x, Tensor)),
        activations=activations,
        batch=num_bytes(tensors_of(batch)),
        peak=ledger.peak + reserved,
        flops=flops * accumulate // passes,
        recomputed=recomputed * accumulate // passes,
        block=max(blocks, default=0),
    )


def convert(framework: Framework, dtype: torch.dtype) -> None:
    """`framework.to(dtype)`, which cannot change fake parameters in place. Statistics stay as they are."""
    made: dict[int, nn.Parameter] = {}
    for module in framework.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point():
                continue
            if id(parameter) not in made:
                cast = parameter.detach().to(dtype)
                made[id(parameter)] = nn.Parameter(cast, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if module is not framework.normalizer and buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)


def half_of(precision: str) -> torch.dtype | None:
    """The 16-bit type of a `trainer.precision`."""
    return torch.bfloat16 if precision.startswith("bf16") else torch.float16 if "16" in precision else None


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_of(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [tensor for name in value.__dataclass_fields__ for tensor in tensors_of(getattr(value, name))]
    return []


def eight_bit_state(parameter: Tensor) -> int:
    """Two moments in a byte each with a scale per block; small tensors keep 32 bits."""
    count = parameter.numel()
    return 8 * count if count < MIN_8BIT else 2 * (count + 4 * -(-count // BLOCK_8BIT))


@contextmanager
def seeded() -> Iterator[None]:
    """The run's own random numbers are not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
