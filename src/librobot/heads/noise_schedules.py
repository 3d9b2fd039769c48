"""Noise schedules of diffusion heads: how much of the actions is left at each level of noise.

A discrete schedule is abar_i, i = 0 .. n-1, the cumulative product of 1 - beta_i: the share of the variance
that is still signal (Ho et al. 2020, section 2). A continuous one is a standard deviation sigma of the noise
that is added to unscaled actions (Karras et al. 2022). All are computed in float64, because 1 - abar of the
first levels and abar of the last ones are small.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Schedule = Literal["squared_cosine", "linear", "sigmoid"]
Spacing = Literal["trailing", "leading", "linspace", "karras"]


def squared_cosine(num_levels: int, max_beta: float = 0.999) -> Float[Tensor, " i"]:
    """abar of Nichol and Dhariwal 2021, equation 17, with their bound on beta near the end."""

    def level(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    u = [i / num_levels for i in range(num_levels + 1)]
    betas = [min(1 - level(u[i + 1]) / level(u[i]), max_beta) for i in range(num_levels)]
    return _accumulate(torch.tensor(betas, dtype=torch.float64))


def linear(num_levels: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Float[Tensor, " i"]:
    """abar of betas that grow linearly (Ho et al. 2020, section 4).

    The two betas are those of a schedule with 1000 levels. With fewer levels each takes a larger step, by
    1000 / num_levels, so that the last one is as noisy (Nichol and Dhariwal's code does the same).
    Raises ValueError where that makes a beta of 1 or more.
    """
    start, end = _scaled(num_levels, beta_start, beta_end)
    return _accumulate(torch.linspace(start, end, num_levels, dtype=torch.float64))


def sigmoid(num_levels: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Float[Tensor, " i"]:
    """abar of betas that grow as a sigmoid from -6 to 6 (Xu et al. 2022, GeoDiff); else as `linear`."""
    start, end = _scaled(num_levels, beta_start, beta_end)
    share = torch.linspace(-6, 6, num_levels, dtype=torch.float64).sigmoid()
    return _accumulate(start + (end - start) * share)


def zero_terminal_snr(abar: Float[Tensor, " i"]) -> Float[Tensor, " i"]:
    """Shift and scale sqrt(abar) so that the last level is noise alone and the first stays (Lin et al. 2024,
    algorithm 1). Raises ValueError for a schedule of one level, which cannot be both."""
    if len(abar) < 2:
        raise ValueError(f"a zero terminal SNR needs at least 2 noise levels, found {len(abar)}")
    signal = abar.sqrt()
    first, last = signal[0], signal[-1]
    return ((signal - last) * first / (first - last)).square()


def karras_sigmas(
    num_levels: int, sigma_min: float, sigma_max: float, rho: float = 7.0
) -> Float[Tensor, " i"]:
    """sigma_max down to sigma_min, evenly spaced in sigma^(1/rho) (Karras et al. 2022, equation 5, without
    the final 0). A single level is sigma_max."""
    steps = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_levels, dtype=torch.float64)
    return steps**rho


def spaced_indices(num_levels: int, num_steps: int, spacing: Spacing) -> list[int]:
    """The levels that sampling visits, noisiest first, by the names of Lin et al. 2024, table 2.

    `trailing` starts at the noisiest level, `leading` ends at the cleanest, `linspace` does both (except with
    one step, where it takes the cleanest). `karras` needs noise levels, not only their number: see `DDPM`.
    """
    if spacing == "trailing":
        return [round(num_levels * (num_steps - i) / num_steps) - 1 for i in range(num_steps)]
    if spacing == "leading":
        return [i * (num_levels // num_steps) for i in reversed(range(num_steps))]
    return [round(i * (num_levels - 1) / max(num_steps - 1, 1)) for i in reversed(range(num_steps))]


def _scaled(num_levels: int, beta_start: float, beta_end: float) -> tuple[float, float]:
    scale = 1000 / num_levels
    if not 0 < beta_start <= beta_end < 1 / scale:
        raise ValueError(
            f"beta_start and beta_end must satisfy 0 < beta_start <= beta_end < num_train_steps / 1000 = "
            f"{1 / scale:g}, found {beta_start:g} and {beta_end:g}; take more steps or "
            f"schedule=squared_cosine"
        )
    return beta_start * scale, beta_end * scale


def _accumulate(betas: Float[Tensor, " i"]) -> Float[Tensor, " i"]:
    return (1 - betas).cumprod(0)
