"""Solvers of dx/dt = v(x, t) from t = 1 (noise) down to t = 0 (data), in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Solver = Literal["euler", "midpoint", "heun", "adaptive"]
Velocity = Callable[[Float[Tensor, "b k a"], float], Float[Tensor, "b k a"]]

CALLS = {"euler": 1, "midpoint": 2, "heun": 2}  # of the velocity, a step


def integrate(
    velocity: Velocity, x: Float[Tensor, "b k a"], num_steps: int, solver: Solver = "euler"
) -> Float[Tensor, "b k a"]:
    """Equal steps: `euler` has order 1, `midpoint` and `heun` (the explicit trapezoid) order 2."""
    x, size = x.float(), 1.0 / num_steps
    for step in range(num_steps):
        here, there = 1.0 - step / num_steps, 1.0 - (step + 1) / num_steps
        v = velocity(x, here)
        if solver == "midpoint":
            v = velocity(x - 0.5 * size * v, 0.5 * (here + there))
        elif solver == "heun":
            v = 0.5 * (v + velocity(x - size * v, there))
        x = x - size * v
    return x


def integrate_adaptively(
    velocity: Velocity, x: Float[Tensor, "b k a"], *, rtol: float, atol: float
) -> Float[Tensor, "b k a"]:
    """Dormand and Prince's method of order 5, whose steps follow the estimated error (torchdiffeq)."""
    from torchdiffeq import odeint

    def derivative(time: Tensor, x: Tensor) -> Tensor:
        return velocity(x, float(time))

    ends = torch.tensor([1.0, 0.0], device=x.device)
    return odeint(derivative, x.float(), ends, rtol=rtol, atol=atol, method="dopri5")[-1]
