"""A trained head and its network, from which another head learns, on the straight path from data to noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from librobot.heads.base import ActionHead, Denoiser
from librobot.heads.ddpm import DDPM
from librobot.heads.diffusion_solvers import Level, estimate_clean
from librobot.heads.edm import EDM
from librobot.heads.flow_matching import FlowMatching


class Teacher:
    """Holds the frozen pair. No `nn.Module`, so its weights are none of the student's."""

    def __init__(self, source: str | None) -> None:
        self.source = source
        self._pair: tuple[ActionHead, Denoiser] | None = None

    def take(self, head: ActionHead, denoiser: Denoiser) -> None:
        """Raises ValueError for a head that has no path from noise to actions."""
        if not isinstance(head, FlowMatching | DDPM | EDM):
            raise ValueError(
                f"the teacher's head must be flow matching, DDPM or EDM, found {type(head).__name__}"
            )
        self._pair = (head, denoiser)

    @property
    def head(self) -> Any:
        return self._checked()[0]

    @property
    def denoiser(self) -> Denoiser:
        return self._checked()[1]

    def _checked(self) -> tuple[ActionHead, Denoiser]:
        if self._pair is None:
            raise ValueError(
                f"this head learns from a trained policy, found head.teacher={self.source or 'null'} and no "
                f"policy read; give head.teacher=CHECKPOINT, of flow matching or diffusion"
            )
        return self._pair

    @torch.no_grad()
    def velocity(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], context: Any
    ) -> Float[Tensor, "b k a"]:
        """dx/dt at x_t = t * noise + (1 - t) * actions.

        Every Gaussian path is this one in other units (Karras et al. 2022, section 3): a diffusion teacher is
        asked at its own level with the same ratio of noise to signal, t / (1 - t).
        """
        head, denoiser = self._checked()
        x_t = x_t.float()
        if isinstance(head, FlowMatching):
            return head.velocity(denoiser, x_t, time, context).float()
        clean = (_ddpm_clean if isinstance(head, DDPM) else _edm_clean)(head, denoiser, x_t, time, context)
        return (x_t - clean) / time.float()[:, None, None]


def _ddpm_clean(head: Any, denoiser: Denoiser, x_t: Tensor, time: Tensor, context: Any) -> Tensor:
    """DDPM's estimate of the clean actions, at a time between its levels if need be."""
    levels = [level for level in head.train_levels if math.isfinite(level.log_snr)]
    log_ratio = torch.logit(time.double().clamp(1e-6, 1 - 1e-6))
    known = [-level.log_snr for level in levels]
    asked = log_ratio.clamp(known[0], known[-1])
    own_time = torch.from_numpy(np.interp(asked.cpu().numpy(), known, [level.time for level in levels]))
    sigma = asked.exp() / (1 + (2 * asked).exp()).sqrt()
    alpha = (1 - sigma.square()).clamp_min(1e-12).sqrt()
    alpha, sigma = (x.float().to(x_t.device)[:, None, None] for x in (alpha, sigma))
    t = time.float()[:, None, None]
    own = x_t / (t.square() + (1 - t).square()).sqrt()
    output = denoiser(own, own_time.float().to(x_t.device), context).float()
    clean = estimate_clean(own, output, Level(0.0, alpha, sigma), head.prediction)  # type: ignore[arg-type]
    # Bounded as in the teacher's own sampling: near t = 1 an error of `epsilon` is divided by almost 0.
    return clean if head.clip is None else clean.clamp(-head.clip, head.clip)


def _edm_clean(head: Any, denoiser: Denoiser, x_t: Tensor, time: Tensor, context: Any) -> Tensor:
    """EDM's estimate of the clean actions, at most at its greatest level of noise."""
    t = time.double().clamp(head.sigma_min / (1 + head.sigma_min), head.sigma_max / (1 + head.sigma_max))
    sigma = t / (1 - t)
    own_time = (sigma / head.sigma_min).log() / math.log(head.sigma_max / head.sigma_min)
    scale = (sigma + 1).float()[:, None, None]  # x / (1 - t) = actions + sigma * noise
    c_skip, c_out, c_in = head.preconditioning(sigma.float()[:, None, None])
    x = x_t * scale
    return c_skip * x + c_out * denoiser(c_in * x, own_time.float(), context).float()
