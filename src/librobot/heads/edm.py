"""Diffusion with preconditioning ("EDM", Karras et al. 2022), over a continuous noise level sigma.

    x = actions + sigma * noise        D(x; sigma) = c_skip * x + c_out * F(c_in * x; time)

F is the denoiser, whose input and target have unit variance at every sigma; D estimates the clean actions.
F sees c_in * x and the time (ln sigma - ln sigma_min) / (ln sigma_max - ln sigma_min) in [0, 1], the paper's
c_noise = ln(sigma) / 4 shifted and scaled so that 1 is noise as for every head. Used by BESO (Reuss et al.
2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from librobot import losses, replicas
from librobot.heads import diffusion_solvers as solvers
from librobot.heads.base import ActionHead, Denoiser, Mask, at_least_one, hold_last
from librobot.heads.diffusion_solvers import Level
from librobot.heads.noise_schedules import karras_sigmas

Sampler = Literal["euler", "heun", "dpm_solver++"]


class EDM(ActionHead):
    """The denoiser predicts F.

    `sigma_data` is the standard deviation of normalised actions (1 for mean_std; the paper's 0.5 is near that
    of min_max). Training draws ln sigma from N(p_mean, p_std^2), within `sigma_min` to `sigma_max`.

    `sampler`: `euler` and `dpm_solver++` (multistep, second order, Lu et al. 2022) call the network once a
    step, `heun` (the paper's algorithm 1, second order) twice but for the last. The steps go from `sigma_max`
    to `sigma_min`, spaced by `rho`, and then to 0. With fewer than about 8 steps those are so long that the
    second order hurts: `euler`, which is DDIM (BESO's choice), is the default.
    """

    generative: ClassVar[bool] = True

    def __init__(
        self,
        *,
        sigma_data: float = 1.0,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        p_mean: float = -1.2,
        p_std: float = 1.2,
        sampler: Sampler = "euler",
        num_steps: int = 10,
        rho: float = 7.0,
        dim_weights: Sequence[float] | None = None,
        drop_context: float = 0.0,
    ) -> None:
        super().__init__(dim_weights=dim_weights, drop_context=drop_context)
        if sampler not in get_args(Sampler):
            raise ValueError(f"sampler must be one of {', '.join(get_args(Sampler))}, found {sampler!r}")
        for name, value in (("sigma_data", sigma_data), ("p_std", p_std), ("rho", rho)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, found {value}")
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"sigma_min must lie above 0 and below sigma_max={sigma_max:g}, found {sigma_min:g}"
            )
        self.sigma_data, self.sigma_min, self.sigma_max = sigma_data, sigma_min, sigma_max
        self.p_mean, self.p_std = p_mean, p_std
        self.sampler, self.rho = sampler, rho
        self.num_steps = at_least_one(num_steps)

    def loss(
        self,
        denoiser: Denoiser,
        context: Any,
        actions: Float[Tensor, "b k a"],
        mask: Mask,
        *,
        noise: Float[Tensor, "b k a"] | None = None,
        time: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, " b"]:
        """The paper's lambda(sigma) * |D - actions|^2 with lambda = 1 / c_out^2 (equation 8 and table 1), so
        the plain squared error of F against (actions - c_skip * x) / c_out."""
        actions = hold_last(actions, mask)
        noise = replicas.randn_like(actions) if noise is None else noise
        time = self.draw_time(len(actions)) if time is None else time.float()
        sigma = self.sigma(time)[:, None, None]
        x = actions.float() + sigma * noise.float()
        c_skip, c_out, c_in = self.preconditioning(sigma)
        target = (actions.float() - c_skip * x) / c_out
        context = self.training_context(context, len(actions))
        output = denoiser((c_in * x).to(actions.dtype), time, context)
        return losses.mse(output, target, mask, self.dim_weights)

    def sample(
        self,
        denoiser: Denoiser,
        context: Any,
        shape: tuple[int, int, int],
        *,
        noise: Float[Tensor, "*steps b k a"] | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
    ) -> Float[Tensor, "b k a"]:
        """Deterministic given `noise`, which is standard normal and scaled by `sigma_max` here. Arithmetic is
        in float32, whatever the network's precision."""
        levels = self.levels(self.num_steps if num_steps is None else at_least_one(num_steps))
        denoiser = self.guided(denoiser, context, shape[0], guidance)
        x = self.sigma_max * (self.draw_noise(shape) if noise is None else noise).float()
        before: tuple[Level, Tensor] | None = None
        for here, there in pairwise(levels):
            clean = self.estimate(denoiser, context, x, here)
            towards = clean
            if self.sampler == "dpm_solver++" and before is not None:
                towards = solvers.extrapolate(clean, before[1], before[0], here, there)
            stepped = solvers.step(x, towards, here, there)
            if self.sampler == "heun" and there.sigma > 0:
                clean_there = self.estimate(denoiser, context, stepped, there)
                stepped = solvers.heun_correction(x, clean, stepped, clean_there, here, there)
            x, before = stepped, (here, clean)
        return x

    def num_calls(self, num_steps: int) -> int:
        """The network calls of a sample (guidance doubles them)."""
        return 2 * num_steps - 1 if self.sampler == "heun" else num_steps

    def estimate(
        self, denoiser: Denoiser, context: Any, x: Float[Tensor, "b k a"], level: Level
    ) -> Float[Tensor, "b k a"]:
        """D: the clean actions (equation 7)."""
        c_skip, c_out, c_in = self.preconditioning(level.sigma)
        time = torch.full((len(x),), level.time, device=x.device)
        return c_skip * x + c_out * denoiser(c_in * x, time, context).float()

    def preconditioning[S: (float, Tensor)](self, sigma: S) -> tuple[S, S, S]:
        """c_skip, c_out and c_in (table 1)."""
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total**0.5, 1 / total**0.5

    def levels(self, num_steps: int) -> list[Level]:
        """The levels that sampling visits, noisiest first, and the clean actions that end it."""
        sigmas = karras_sigmas(num_steps, self.sigma_min, self.sigma_max, self.rho).tolist()
        span = math.log(self.sigma_max / self.sigma_min)
        # Rounding must not put the ends of the range outside it.
        times = [min(max(math.log(x / self.sigma_min) / span, 0.0), 1.0) for x in sigmas]
        return [*(Level(t, 1.0, x) for t, x in zip(times, sigmas, strict=True)), Level(0.0, 1.0, 0.0)]

    def sigma(self, time: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The noise level at a time in [0, 1]."""
        return self.sigma_min * (time * math.log(self.sigma_max / self.sigma_min)).exp()

    def draw_time(self, count: int) -> Float[Tensor, " b"]:
        """Times of log-normal noise levels, in float32."""
        device = self.anchor.device
        normal = replicas.draw(lambda n: torch.randn(n, device=device, dtype=torch.float32), count)
        log_sigma = self.p_mean + self.p_std * normal
        span = math.log(self.sigma_max / self.sigma_min)
        return ((log_sigma - math.log(self.sigma_min)) / span).clamp(0.0, 1.0)
