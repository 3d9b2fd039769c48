"""What every augmentation has, and how they follow each other.

    conf/augmentation/NAME.yaml    {NAME: {_target_: ...}}; chosen by augmentation=[NAME,NAME]

One that changes tensors is called with the whole training batch, on its device. One that changes instructions
(`rewrite`) runs in the data workers, before they are tokenised.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from librobot.types import Batch, RobotSpec


class Augmentation(Protocol):
    """Changes a training batch, on its device. The same `seed` gives the same draws."""

    def __call__(self, batch: Batch, *, seed: Sequence[int]) -> Batch: ...


@runtime_checkable
class Rewriting(Protocol):
    """Changes instructions, in a data worker. The same `seed` gives the same draws."""

    def rewrite(self, prompts: Sequence[str], *, seed: Sequence[int]) -> list[str]: ...


@runtime_checkable
class Learning(Protocol):
    """Wants to know the robots and their statistics before the first batch."""

    def learn(
        self, robots: Sequence[RobotSpec], statistics: Sequence[Mapping[str, Mapping[str, np.ndarray]]]
    ) -> None: ...


def named_seed(seed: Sequence[int], name: str) -> tuple[int, ...]:
    """A seed of its own for each augmentation, whichever others there are."""
    return (*seed, zlib.crc32(name.encode()))


def generator_for(seed: Sequence[int], device: torch.device | str = "cpu") -> torch.Generator:
    state = np.random.SeedSequence(list(seed)).generate_state(1)[0]
    return torch.Generator(device=device).manual_seed(int(state))


def on_images(
    batch: Batch,
    change: Callable[[UInt8[Tensor, "b t c h w"], torch.Generator], UInt8[Tensor, "b t c h w"]],
    *,
    seed: Sequence[int],
    cameras: Sequence[str] | None = None,
) -> Batch:
    """`batch` with each camera's images changed, all or the named ones; draws come from a CPU generator."""
    generator, images = generator_for(seed), batch.observation.images
    changed = {name: change(images[name], generator) for name in sorted(cameras or images) if name in images}
    return replace(batch, observation=replace(batch.observation, images={**images, **changed}))


def chosen(count: int, probability: float, generator: torch.Generator) -> Bool[Tensor, " b"]:
    """Which samples are changed."""
    return torch.rand(count, generator=generator) < probability


def between(
    limits: tuple[float, float], shape: int | tuple[int, ...], generator: torch.Generator
) -> Float[Tensor, "..."]:
    low, high = limits
    return low + (high - low) * torch.rand(shape, generator=generator)


def check_share(name: str, value: float, high: float = 1.0) -> float:
    """Raises ValueError for what does not lie in [0, high]."""
    if not 0 <= value <= high:
        raise ValueError(f"{name} must lie in [0, {high:g}], found {value}")
    return float(value)


def check_range(name: str, limits: Any, low: float, high: float) -> tuple[float, float]:
    """Raises ValueError for what is no ascending pair in [low, high]."""
    pair = list(limits) if isinstance(limits, Sequence) and not isinstance(limits, str) else []
    if len(pair) != 2 or not low <= pair[0] <= pair[1] <= high:
        raise ValueError(f"{name} must be two ascending numbers in [{low:g}, {high:g}], found {limits}")
    return float(pair[0]), float(pair[1])
