"""Denoising diffusion (Ho et al. 2020) over discrete noise levels.

    x_i = sqrt(abar_i) * actions + sqrt(1 - abar_i) * noise        i = 0 .. num_train_steps - 1

The denoiser sees the time t = (i + 1) / num_train_steps in (0, 1], where 1 is noise as for every head. Used
by Diffusion Policy (Chi et al. 2023), Octo (2024) and the diffusion variant of OpenVLA-OFT (Kim et al. 2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from librobot import losses, replicas
from librobot.heads import diffusion_solvers as solvers
from librobot.heads import noise_schedules
from librobot.heads.base import ActionHead, Denoiser, Mask, further_noise, hold_last
from librobot.heads.diffusion_solvers import Level, Prediction
from librobot.heads.noise_schedules import Schedule, Spacing

Sampler = Literal["ddim", "ancestral", "dpm_solver++"]


class DDPM(ActionHead):
    """The denoiser predicts the noise (`epsilon`), the actions (`sample`), or `v` (Salimans and Ho 2022).

    `schedule` is squared_cosine (Nichol and Dhariwal 2021), linear or sigmoid; `beta_start` and `beta_end`
    belong to the latter two. `zero_terminal_snr` makes the noisiest level noise alone (Lin et al. 2024).

    `sampler`: `ddim` (Song et al. 2021) adds no noise after the first at `eta` 0, and is `ancestral` at
    `eta` 1; `ancestral` adds some at every step but the last; `dpm_solver++` is the multistep solver of
    second order (Lu et al. 2022). Each calls the network once a step. `spacing` says which levels the steps
    visit (`noise_schedules.spaced_indices`); `karras` spaces them by Karras et al. 2022, equation 5, with rho
    7, so between the trained levels, at times interpolated in log sigma.

    `clip` bounds the estimated clean actions while sampling, in normalised units (5, as in Octo, suits
    mean_std; 1 suits min_max; null does not bound).
    """

    generative: ClassVar[bool] = True
    alphas_bar: Tensor

    def __init__(
        self,
        *,
        num_train_steps: int = 100,
        schedule: Schedule = "squared_cosine",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        zero_terminal_snr: bool = False,
        prediction: Prediction = "epsilon",
        sampler: Sampler = "ddim",
        num_steps: int = 10,
        spacing: Spacing = "trailing",
        eta: float = 0.0,
        clip: float | None = 5.0,
        dim_weights: Sequence[float] | None = None,
        drop_context: float = 0.0,
    ) -> None:
        super().__init__(dim_weights=dim_weights, drop_context=drop_context)
        for name, value, options in (
            ("schedule", schedule, get_args(Schedule)),
            ("prediction", prediction, get_args(Prediction)),
            ("sampler", sampler, get_args(Sampler)),
            ("spacing", spacing, get_args(Spacing)),
        ):
            if value not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}, found {value!r}")
        if zero_terminal_snr and prediction == "epsilon":
            raise ValueError(
                "prediction must be v or sample with zero_terminal_snr, found 'epsilon'; where noise is "
                "alone, predicting it says nothing about the actions"
            )
        if zero_terminal_snr and spacing == "karras":
            raise ValueError(
                "spacing must be trailing, leading or linspace with zero_terminal_snr, found 'karras'; it "
                "needs a finite sigma_max"
            )
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta must lie between 0 and 1, found {eta}")
        if eta and sampler != "ddim":
            raise ValueError(f"eta belongs to sampler=ddim, found eta={eta:g} with {sampler}; leave it at 0")
        self.num_train_steps, self.prediction, self.clip = num_train_steps, prediction, clip
        self.sampler, self.spacing = sampler, spacing
        self.eta = {"ddim": eta, "ancestral": 1.0, "dpm_solver++": 0.0}[sampler]
        self.num_steps = self._checked(num_steps)

        if schedule == "squared_cosine":
            abar = noise_schedules.squared_cosine(num_train_steps)
        else:
            betas = noise_schedules.linear if schedule == "linear" else noise_schedules.sigmoid
            abar = betas(num_train_steps, beta_start, beta_end)
        if zero_terminal_snr:
            abar = noise_schedules.zero_terminal_snr(abar)
        # Training reads the buffer; sampling reads Python numbers, which cost a GPU nothing and are exact.
        self.register_buffer("alphas_bar", abar.float(), persistent=False)
        self.train_levels = [
            Level((i + 1) / num_train_steps, math.sqrt(x), math.sqrt(1 - x))
            for i, x in enumerate(abar.tolist())
        ]

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
        """A given `time` stands for the level nearest to it."""
        actions = hold_last(actions, mask)
        noise = replicas.randn_like(actions) if noise is None else noise
        if time is None:
            steps, device = self.num_train_steps, actions.device
            index = replicas.draw(lambda n: torch.randint(steps, (n,), device=device), len(actions))
        else:
            index = (time * self.num_train_steps).round().long().clamp(1, self.num_train_steps) - 1
        signal, sigma = (x.to(actions.dtype) for x in self._scales(index))
        x_t = signal * actions + sigma * noise
        target = {"epsilon": noise, "sample": actions, "v": signal * noise - sigma * actions}[self.prediction]
        context = self.training_context(context, len(actions))
        output = denoiser(x_t, (index + 1).float() / self.num_train_steps, context)
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
        """With a stochastic sampler (`ancestral`, or `eta` above 0) `noise` may have a leading axis of
        `num_steps`: the first entry is x at t = 1, the others are what each step adds. Without it they
        follow from the first (`further_noise`). Arithmetic is in float32."""
        levels = self.levels(self.num_steps if num_steps is None else self._checked(num_steps))
        denoiser = self.guided(denoiser, context, shape[0], guidance)
        noise = self.draw_noise(shape) if noise is None else noise
        added = None if noise.ndim == 3 else noise[1:]
        x_t = (noise if noise.ndim == 3 else noise[0]).float()
        before: tuple[Level, Tensor] | None = None
        for i, (here, there) in enumerate(pairwise(levels)):
            time = torch.full((shape[0],), here.time, device=x_t.device)
            output = denoiser(x_t, time, context).float()
            clean = solvers.estimate_clean(x_t, output, here, self.prediction)
            if self.clip is not None:
                clean = clean.clamp(-self.clip, self.clip)
            fresh = None
            if self.eta and there.sigma > 0:
                fresh = further_noise(noise, i + 1) if added is None else added[i].float()
            towards = clean
            if self.sampler == "dpm_solver++" and before is not None:
                towards = solvers.extrapolate(clean, before[1], before[0], here, there)
            x_t = solvers.step(x_t, towards, here, there, fresh=fresh, eta=self.eta)
            before = (here, clean)
        return x_t

    def num_calls(self, num_steps: int) -> int:
        """The network calls of a sample: one a step (guidance doubles it)."""
        return num_steps

    def levels(self, num_steps: int) -> list[Level]:
        """The levels that sampling visits, noisiest first, and the clean actions that end it."""
        if self.spacing == "karras":
            visited = self._karras_levels(num_steps)
        else:
            indices = noise_schedules.spaced_indices(self.num_train_steps, num_steps, self.spacing)
            visited = [self.train_levels[i] for i in indices]
        return [*visited, Level(0.0, 1.0, 0.0)]

    def _karras_levels(self, num_steps: int) -> list[Level]:
        log_sigmas = [-level.log_snr for level in self.train_levels]
        first, last = math.exp(log_sigmas[0]), math.exp(log_sigmas[-1])
        found = []
        for sigma in noise_schedules.karras_sigmas(num_steps, first, last).tolist():
            time = np.interp(math.log(sigma), log_sigmas, [level.time for level in self.train_levels])
            scale = 1 / math.sqrt(1 + sigma**2)
            found.append(Level(float(time), scale, sigma * scale))
        return found

    def _checked(self, num_steps: int) -> int:
        if not 1 <= num_steps <= self.num_train_steps:
            raise ValueError(
                f"num_steps must lie between 1 and num_train_steps={self.num_train_steps}, found {num_steps}"
            )
        return num_steps

    def _scales(self, index: Int[Tensor, " b"]) -> tuple[Tensor, Tensor]:
        abar = self.alphas_bar[index][:, None, None]
        return abar.sqrt(), (1 - abar).sqrt()

    def _apply(self, fn: Any, recurse: bool = True) -> DDPM:
        """Move, but keep the schedule in float32: half precision cannot tell its first steps from 1."""
        exact = self.alphas_bar
        super()._apply(fn, recurse)
        self.alphas_bar = exact.to(self.alphas_bar.device)
        return self
