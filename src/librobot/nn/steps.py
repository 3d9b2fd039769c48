"""Step numbers as vectors."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def step_embedding(step: Int[Tensor, " b"], width: int, *, to_the_last: bool = False) -> Float[Tensor, "b d"]:
    """Sines, then cosines, of a step number at log-spaced frequencies from 1 down to 1/10000. With
    `to_the_last` the last frequency is 1/10000 itself, else the one that would follow it."""
    if width % 2:
        raise ValueError(f"a sinusoidal embedding needs an even width, found {width}")
    half = width // 2
    exponent = torch.arange(half, device=step.device, dtype=torch.float32)
    frequency = (-math.log(10_000.0) / (half - to_the_last) * exponent).exp()
    angle = step.float()[:, None] * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=-1)
