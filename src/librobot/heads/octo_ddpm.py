"""Octo's diffusion head (Octo Model Team 2024; code octo `action_heads.py`, `DiffusionActionHead`)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from librobot.heads import diffusion_solvers as solvers
from librobot.heads.base import Denoiser, Mask, further_noise
from librobot.heads.ddpm import DDPM


class OctoDDPM(DDPM):
    """DDPM as Octo writes it, where it differs from the diffusion of `head=ddpm`:

    - actions are clipped to +-`clip` before they are noised, and so is x after every sampling step, rather
      than the estimated clean actions;
    - the noise that a sampling step adds has the variance beta of the forward process, the larger of the two
      that Ho et al. 2020 name (section 3.2);
    - a sample's loss is the sum over action dimensions (the mean over steps).

    Fewer `num_steps` than levels skip levels, with the beta from one visited level to the next.
    """

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
        if self.clip is not None:
            actions = actions.clamp(-self.clip, self.clip)
        return self.action_dim * super().loss(denoiser, context, actions, mask, noise=noise, time=time)

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
        levels = self.levels(self.num_steps if num_steps is None else self._checked(num_steps))
        denoiser = self.guided(denoiser, context, shape[0], guidance)
        noise = self.draw_noise(shape) if noise is None else noise
        added = None if noise.ndim == 3 else noise[1:]
        x_t = (noise if noise.ndim == 3 else noise[0]).float()
        for i, (here, there) in enumerate(pairwise(levels)):
            time = torch.full((shape[0],), here.time, device=x_t.device)
            epsilon = denoiser(x_t, time, context).float()
            if self.prediction != "epsilon":
                clean = solvers.estimate_clean(x_t, epsilon, here, self.prediction)
                epsilon = (x_t - here.alpha * clean) / here.sigma
            kept = (here.alpha / there.alpha) ** 2  # 1 - beta
            x_t = (x_t - (1 - kept) / here.sigma * epsilon) / kept**0.5
            if there.sigma > 0:
                fresh = further_noise(noise, i + 1) if added is None else added[i].float()
                x_t = x_t + (1 - kept) ** 0.5 * fresh
            if self.clip is not None:
                x_t = x_t.clamp(-self.clip, self.clip)
        return x_t
