"""Denoising diffusion (Ho et al. 2020), with the squared-cosine schedule of Nichol and Dhariwal (2021).

    x_i = sqrt(abar_i) * actions + sqrt(1 - abar_i) * noise        i = 0 .. num_train_steps - 1

The denoiser sees the time t = (i + 1) / num_train_steps in (0, 1], where 1 is noise as for every head. Used
by Diffusion Policy (Chi et al. 2023) and Octo (2024).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from librobot import losses
from librobot.heads.base import ActionHead, Denoiser, Mask, hold_last

Prediction = Literal["epsilon", "sample", "v"]
Sampler = Literal["ddim", "ancestral"]


class DDPM(ActionHead):
    """The denoiser predicts the noise (`epsilon`), the actions (`sample`), or `v` (Salimans and Ho 2022).

    `ddim` (Song et al. 2021, eta 0) needs no noise after the first; `ancestral` adds some at every step but
    the last. `clip` bounds the estimated clean actions while sampling, in normalised units (5, as in Octo,
    suits mean_std; 1 suits min_max; null does not bound).
    """

    generative: ClassVar[bool] = True
    alphas_bar: Tensor

    def __init__(
        self,
        *,
        num_train_steps: int = 100,
        prediction: Prediction = "epsilon",
        sampler: Sampler = "ddim",
        steps: int = 10,
        clip: float | None = 5.0,
    ) -> None:
        super().__init__()
        for name, value, options in (
            ("prediction", prediction, get_args(Prediction)),
            ("sampler", sampler, get_args(Sampler)),
        ):
            if value not in options:
                raise ValueError(f"{name} must be one of {options}, found {value!r}")
        if not 1 <= steps <= num_train_steps:
            raise ValueError(f"steps must lie between 1 and num_train_steps={num_train_steps}, found {steps}")
        self.prediction, self.sampler, self.steps, self.clip = prediction, sampler, steps, clip
        self.num_train_steps = num_train_steps
        self.register_buffer("alphas_bar", squared_cosine(num_train_steps), persistent=False)

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
        actions = hold_last(actions, mask)
        noise = torch.randn_like(actions) if noise is None else noise
        if time is None:
            index = torch.randint(self.num_train_steps, (len(actions),), device=actions.device)
        else:
            index = (time * self.num_train_steps).ceil().long().clamp(1, self.num_train_steps) - 1
        signal, sigma = (x.to(actions.dtype) for x in self._scales(index))
        x_t = signal * actions + sigma * noise
        target = {"epsilon": noise, "sample": actions, "v": signal * noise - sigma * actions}[self.prediction]
        return losses.mse(denoiser(x_t, self._time(index), context), target, mask)

    def sample(
        self,
        denoiser: Denoiser,
        context: Any,
        shape: tuple[int, int, int],
        *,
        noise: Float[Tensor, "*steps b k a"] | None = None,
        steps: int | None = None,
    ) -> Float[Tensor, "b k a"]:
        """With the ancestral sampler, `noise` may have a leading axis of `steps`: the first entry is x at
        t = 1, the others are what each step adds. Without it they are drawn."""
        steps = self.steps if steps is None else steps
        noise = self.draw_noise(shape) if noise is None else noise
        added = None if noise.ndim == 3 else noise[1:]
        x_t = (noise if noise.ndim == 3 else noise[0]).float()
        indices = self.timesteps(steps)
        for step, index in enumerate(indices):
            following = indices[step + 1] if step + 1 < steps else -1
            batch_index = torch.full((shape[0],), index, device=x_t.device)
            output = denoiser(x_t, self._time(batch_index), context)
            fresh = None
            if self.sampler == "ancestral" and following >= 0:
                fresh = self.draw_noise(shape) if added is None else added[step]
            x_t = self.step(x_t, output, index, following, fresh)
        return x_t

    def timesteps(self, steps: int) -> list[int]:
        """Evenly spaced indices from the noisiest one down ("trailing" spacing, Lin et al. 2024, table 2)."""
        return [round(self.num_train_steps * (steps - i) / steps) - 1 for i in range(steps)]

    def step(
        self,
        x_t: Float[Tensor, "b k a"],
        output: Float[Tensor, "b k a"],
        index: int,
        following: int,
        fresh: Float[Tensor, "b k a"] | None = None,
    ) -> Float[Tensor, "b k a"]:
        """From index to `following` (-1: clean). `fresh` noise makes the step ancestral (DDIM's eta = 1)."""
        abar = self.alphas_bar[index]
        abar_next = self.alphas_bar[following] if following >= 0 else torch.ones_like(abar)
        clean, noise = self._decompose(x_t, output.float(), abar)
        variance = torch.zeros_like(abar)
        if fresh is not None:
            variance = (1 - abar_next) / (1 - abar) * (1 - abar / abar_next)
        x = abar_next.sqrt() * clean + (1 - abar_next - variance).clamp_min(0).sqrt() * noise
        if fresh is not None:
            x = x + variance.sqrt() * fresh
        return x

    def _decompose(self, x_t: Tensor, output: Tensor, abar: Tensor) -> tuple[Tensor, Tensor]:
        """The clean actions and the noise that the network's output stands for."""
        signal, sigma = abar.sqrt(), (1 - abar).sqrt()
        if self.prediction == "epsilon":
            clean = (x_t - sigma * output) / signal
        elif self.prediction == "sample":
            clean = output
        else:
            clean = signal * x_t - sigma * output
        if self.clip is not None:
            clean = clean.clamp(-self.clip, self.clip)
        return clean, (x_t - signal * clean) / sigma

    def _scales(self, index: Int[Tensor, " b"]) -> tuple[Tensor, Tensor]:
        abar = self.alphas_bar[index][:, None, None]
        return abar.sqrt(), (1 - abar).sqrt()

    def _time(self, index: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        return (index + 1).float() / self.num_train_steps

    def _apply(self, fn: Any, recurse: bool = True) -> DDPM:
        """Move, but keep the schedule in float32: half precision cannot tell its first steps from 1."""
        exact = self.alphas_bar
        super()._apply(fn, recurse)
        self.alphas_bar = exact.to(self.alphas_bar.device)
        return self


def squared_cosine(num_steps: int, max_beta: float = 0.999) -> Float[Tensor, " i"]:
    """Cumulative products abar_i of 1 - beta_i (Nichol and Dhariwal 2021, equation 17), in float32."""

    def level(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - level((i + 1) / num_steps) / level(i / num_steps), max_beta) for i in range(num_steps)]
    return (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0).float()
