"""Steps between noise levels, shared by the diffusion heads.

    x = alpha * clean + sigma * noise        lambda = log(alpha / sigma)

A variance-preserving process (DDPM) has alpha^2 + sigma^2 = 1, a variance-exploding one (EDM) alpha = 1; the
formulas are the same. Every solver is written on the estimate of the clean actions ("data prediction"), which
is finite at both ends: lambda is -inf for pure noise and inf for clean actions.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

Prediction = Literal["epsilon", "sample", "v"]


class Level(NamedTuple):
    """A level of noise, and the time at which the network is called there."""

    time: float
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """lambda, half the logarithm of the signal-to-noise ratio."""
        if self.alpha == 0:
            return -math.inf
        return math.inf if self.sigma == 0 else math.log(self.alpha / self.sigma)


def estimate_clean(
    x: Float[Tensor, "b k a"], output: Float[Tensor, "b k a"], level: Level, prediction: Prediction
) -> Float[Tensor, "b k a"]:
    """The clean actions that the network's output stands for (Salimans and Ho 2022, section 4)."""
    if prediction == "epsilon":
        return (x - level.sigma * output) / level.alpha
    if prediction == "v":
        return level.alpha * x - level.sigma * output
    return output


def step(
    x: Float[Tensor, "b k a"],
    clean: Float[Tensor, "b k a"],
    here: Level,
    there: Level,
    *,
    fresh: Float[Tensor, "b k a"] | None = None,
    eta: float = 1.0,
) -> Float[Tensor, "b k a"]:
    """The first-order step: DDIM (Song et al. 2021, equation 12), which for alpha = 1 is Euler's on EDM's
    equation and is DPM-Solver++ of order 1.

    `fresh` standard normal noise makes it stochastic; with eta = 1 it is DDPM's posterior (their equation 16,
    Ho et al. 2020, equations 6 and 7).
    """
    variance = 0.0 if fresh is None else eta**2 * posterior_variance(here, there)
    direction = math.sqrt(max(there.sigma**2 - variance, 0.0)) / here.sigma
    stepped = there.alpha * clean + direction * (x - here.alpha * clean)
    return stepped if fresh is None else stepped + math.sqrt(variance) * fresh


def posterior_variance(here: Level, there: Level) -> float:
    """The variance of x at `there` given x at `here` and the clean actions (Ho et al. 2020, equation 7)."""
    forward = here.sigma**2 - (here.alpha / there.alpha) ** 2 * there.sigma**2
    return (there.sigma / here.sigma) ** 2 * forward


def extrapolate(
    clean: Float[Tensor, "b k a"],
    clean_before: Float[Tensor, "b k a"],
    before: Level,
    here: Level,
    there: Level,
) -> Float[Tensor, "b k a"]:
    """The clean actions halfway (in lambda) to `there`, from the estimates here and one level before.

    `step` with this estimate is DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2). Onto clean actions, where
    lambda ends, the order falls to one: the estimate itself.
    """
    ahead, behind = there.log_snr - here.log_snr, here.log_snr - before.log_snr
    if math.isinf(ahead):
        return clean
    return clean + ahead / (2 * behind) * (clean - clean_before)


def heun_correction(
    x: Float[Tensor, "b k a"],
    clean: Float[Tensor, "b k a"],
    x_there: Float[Tensor, "b k a"],
    clean_there: Float[Tensor, "b k a"],
    here: Level,
    there: Level,
) -> Float[Tensor, "b k a"]:
    """The trapezoidal second half of Heun's step for alpha = 1 (Karras et al. 2022, algorithm 1, line 8);
    `x_there` is where Euler's step arrived and `clean_there` the estimate from it."""
    slope = (x - clean) / here.sigma
    slope_there = (x_there - clean_there) / there.sigma
    return x + (there.sigma - here.sigma) * (slope + slope_there) / 2
