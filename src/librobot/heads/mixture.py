"""Mixture density network (Bishop 1994): the denoiser's output parametrises a mixture of diagonal Gaussians.

    p(actions | context) = sum_m  pi_m * N(actions; mean_m, diag(std_m^2))

As in the deterministic heads the denoiser is called once, with zeros and time 0. Used for imitation by
BC-RNN-GMM (Mandlekar et al. 2021, robomimic), which mixes at every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from librobot.heads.base import ActionHead, Denoiser, Mask

Joint = Literal["chunk", "step"]
Mode = Literal["sample", "best"]


class GaussianMixture(ActionHead):
    """The loss is the negative log-likelihood of a sample, divided by its number of visible elements.

    `joint` says what a mode is a mode of: the whole `chunk` (its mixture logits are the mean of the steps'),
    or each `step`, independently of the others. `min_std` bounds the Gaussians' scale from below, in
    normalised units: without it a constant dimension has an infinite likelihood. With `dim_weights` the log
    densities of elements are weighted, and the loss is then no exact likelihood.

    `mode` is how actions are drawn: `sample`, with the scales multiplied by `temperature`, or `best`, the
    mean of the likeliest mode.
    """

    generative: ClassVar[bool] = False

    def __init__(
        self,
        *,
        num_modes: int = 5,
        joint: Joint = "chunk",
        min_std: float = 0.01,
        mode: Mode = "sample",
        temperature: float = 1.0,
        dim_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(dim_weights=dim_weights)
        for name, value, options in (("joint", joint, get_args(Joint)), ("mode", mode, get_args(Mode))):
            if value not in options:
                raise ValueError(f"{name} must be one of {options}, found {value!r}")
        if num_modes < 1:
            raise ValueError(f"num_modes must be at least 1, found {num_modes}")
        if min_std <= 0:
            raise ValueError(f"min_std must be above 0, found {min_std}")
        if temperature < 0:
            raise ValueError(f"temperature must be at least 0, found {temperature}")
        self.num_modes, self.joint, self.min_std = num_modes, joint, min_std
        self.mode, self.temperature = mode, temperature

    @property
    def stochastic(self) -> bool:
        return self.mode == "sample"

    @property
    def output_width(self) -> int:
        """Of each mode a logit, and a mean and a scale for each dimension."""
        return self.num_modes * (1 + 2 * self.action_dim)

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
        """`noise` and `time` have nothing to act on."""
        output = self._output(denoiser, context, torch.zeros_like(actions))
        weights = torch.ones_like(actions[0, 0]) if self.dim_weights is None else self.dim_weights
        visible = (mask.unsqueeze(-1) if mask.ndim == 2 else mask).expand_as(actions)
        total = (weights.float() * visible).sum(dim=(1, 2))
        return -self._log_density(output, actions, mask, weights) / torch.where(total > 0, total, 1.0)

    def log_likelihood(
        self, denoiser: Denoiser, context: Any, actions: Float[Tensor, "b k a"], mask: Mask
    ) -> Float[Tensor, " b"]:
        """log p(visible elements | context) of each sample in nats; hidden elements are integrated out."""
        output = self._output(denoiser, context, torch.zeros_like(actions))
        return self._log_density(output, actions, mask, torch.ones_like(actions[0, 0]))

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
        """`noise` drives both draws: it is the Gaussian's own, and its first number (of the chunk, or of each
        step) chooses the mode by digits that the Gaussian hardly depends on, see `low_digits`."""
        self.no_guidance(guidance)
        logits, mean, std = self.parameters_of(self._output(denoiser, context, self.anchor.new_zeros(shape)))
        if self.mode == "best":
            return pick(mean, logits.argmax(dim=-1))
        noise = self.draw_noise(shape) if noise is None else noise
        # One number for each mixture: `logits` has one step where a mode is of the whole chunk.
        u = low_digits(noise[:, : logits.shape[1], 0])
        below = logits.double().softmax(dim=-1).cumsum(dim=-1) <= u.unsqueeze(-1)
        chosen = below.sum(dim=-1).clamp_max(self.num_modes - 1)
        return pick(mean, chosen) + self.temperature * pick(std, chosen) * noise.float()

    def parameters_of(
        self, output: Float[Tensor, "b k o"]
    ) -> tuple[Float[Tensor, "b #k m"], Float[Tensor, "b k m a"], Float[Tensor, "b k m a"]]:  # noqa: F821
        """Logits (of one step where a mode is of the whole chunk), means and standard deviations."""
        modes = rearrange(output.float(), "b k (m n) -> b k m n", m=self.num_modes)
        logits, mean, scale = modes.split((1, self.action_dim, self.action_dim), dim=-1)
        logits = logits.squeeze(-1)
        if self.joint == "chunk":
            logits = logits.mean(dim=1, keepdim=True)
        return logits, mean, functional.softplus(scale) + self.min_std

    def _output(
        self, denoiser: Denoiser, context: Any, zeros: Float[Tensor, "b k a"]
    ) -> Float[Tensor, "b k o"]:
        return denoiser(zeros, zeros[:, 0, 0], context)

    def _log_density(
        self,
        output: Float[Tensor, "b k o"],
        actions: Float[Tensor, "b k a"],
        mask: Mask,
        weights: Float[Tensor, " a"],
    ) -> Float[Tensor, " b"]:
        logits, mean, std = self.parameters_of(output)
        visible = (mask.unsqueeze(-1) if mask.ndim == 2 else mask).expand_as(actions)
        # Modes are diagonal, so integrating an element out is leaving it out.
        hidden = ~visible.unsqueeze(2)
        difference = (actions.float().unsqueeze(2) - mean).masked_fill(hidden, 0.0)
        std = std.masked_fill(hidden, 1.0)
        element = -0.5 * (difference / std).square() - std.log() - 0.5 * math.log(2 * math.pi) * ~hidden
        density = (element * weights.float()).sum(dim=-1)
        seen = visible.any(dim=-1)
        if self.joint == "chunk":
            density, seen = density.sum(dim=1, keepdim=True), seen.any(dim=1, keepdim=True)
        mixed = (logits.log_softmax(dim=-1) + density).logsumexp(dim=-1)
        # Where nothing is seen this is log 1, but for rounding.
        return mixed.masked_fill(~seen, 0.0).sum(dim=1)


def pick(values: Float[Tensor, "b k m a"], mode: Int[Tensor, "b #k"]) -> Float[Tensor, "b k a"]:  # noqa: F821
    """Each step's values of the chosen mode."""
    b, k, _, a = values.shape
    index = repeat(mode.expand(b, k), "b k -> b k 1 a", a=a)
    return values.gather(2, index).squeeze(2)


def low_digits(noise: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """u = frac(1000 * Phi(noise)), uniform in [0, 1), in float64, with Phi the normal distribution function.

    Normal numbers that share u lie 1000 to the unit of probability, all over the normal distribution: up to
    a thousandth, a standard normal number is independent of its own low digits.
    """
    return (1000.0 * torch.special.ndtr(noise.double())).frac()
