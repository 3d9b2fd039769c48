"""Conditional variational autoencoder (Kingma and Welling 2014; Sohn et al. 2015) over any denoiser.

    posterior    q(z | actions): a transformer over [CLS, actions]
    decoder      the denoiser, called once at time 0: a linear map of z to a chunk takes the place of x_t
    loss         reconstruction + kl_weight * max(KL(q(z | actions) || N(0, 1)), free_bits)

The posterior is ACT's style encoder (Zhao et al. 2023, section IV) without the state, which the framework
keeps to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from librobot import losses, replicas
from librobot.heads.base import ActionHead, Denoiser, Mask
from librobot.nn.detr import Encoder, LayerOptions
from librobot.nn.positions import sine_table

Reconstruction = Literal["l1", "mse"]
Latent = Literal["prior", "zero"]


class CVAE(ActionHead):
    """`reconstruction` is the error that is averaged over a sample's visible elements; the KL is summed over
    the latent. `free_bits` (nats of a sample's whole latent; Kingma et al. 2016, appendix C.8) is the KL that
    costs nothing: above 0 it keeps the latent from being ignored.

    `latent` is the z that actions are sampled at: a draw from the `prior`, or `zero`, as in ACT. `width`,
    `num_heads`, `feedforward_width`, `num_layers` and `dropout` are the posterior's.
    """

    generative: ClassVar[bool] = True  # x_t carries z

    def __init__(
        self,
        *,
        latent_dim: int = 8,
        reconstruction: Reconstruction = "l1",
        kl_weight: float = 0.1,
        free_bits: float = 0.0,
        latent: Latent = "prior",
        width: int = 128,
        num_heads: int = 4,
        feedforward_width: int = 512,
        num_layers: int = 2,
        dropout: float = 0.0,
        dim_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(dim_weights=dim_weights)
        for name, value, options in (
            ("reconstruction", reconstruction, get_args(Reconstruction)),
            ("latent", latent, get_args(Latent)),
        ):
            if value not in options:
                raise ValueError(f"{name} must be one of {options}, found {value!r}")
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, found {latent_dim}")
        for name, number in (("kl_weight", kl_weight), ("free_bits", free_bits)):
            if number < 0:
                raise ValueError(f"{name} must be at least 0, found {number}")
        self.latent_dim, self.latent = latent_dim, latent
        self.kl_weight, self.free_bits = kl_weight, free_bits
        self.reconstruct = {"l1": losses.l1, "mse": losses.mse}[reconstruction]
        self.layer = LayerOptions(width, num_heads, feedforward_width, dropout)
        self.num_layers = num_layers

    @property
    def stochastic(self) -> bool:
        return self.latent == "prior"

    def attach(self, *, horizon: int, action_dim: int, real_dim: int | None = None) -> None:
        super().attach(horizon=horizon, action_dim=action_dim, real_dim=real_dim)
        if self.latent_dim > horizon * action_dim:
            raise ValueError(
                f"latent_dim must be at most the {horizon} x {action_dim} = {horizon * action_dim} numbers "
                f"of a chunk, which its noise has to fill, found {self.latent_dim}"
            )
        self.posterior = Posterior(horizon, action_dim, self.latent_dim, self.num_layers, self.layer)
        self.latent_proj = nn.Linear(self.latent_dim, horizon * action_dim)

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
        """The first `latent_dim` numbers of a sample's flattened `noise` are the reparametrisation's; `time`
        has nothing to act on."""
        visible = (mask.unsqueeze(-1) if mask.ndim == 2 else mask).expand_as(actions)
        mean, log_variance = self.posterior(actions, visible)
        noise = replicas.randn_like(actions) if noise is None else noise
        z = mean + (0.5 * log_variance).exp() * self._latent_noise(noise)
        error = self.reconstruct(self._decode(denoiser, context, z), actions, mask, self.dim_weights)
        kl = losses.gaussian_kl(mean, log_variance).clamp_min(self.free_bits)
        return error + self.kl_weight * kl.masked_fill(~visible.any(dim=(1, 2)), 0.0)

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
        """A draw from the prior is the first `latent_dim` numbers of a sample's flattened `noise`."""
        self.no_guidance(guidance)
        if self.latent == "zero":
            z = self.anchor.new_zeros(shape[0], self.latent_dim)
        else:
            z = self._latent_noise(self.draw_noise(shape) if noise is None else noise)
        return self._decode(denoiser, context, z)

    def _latent_noise(self, noise: Float[Tensor, "b k a"]) -> Float[Tensor, "b z"]:
        return rearrange(noise, "b k a -> b (k a)")[:, : self.latent_dim].to(self.anchor.dtype)

    def _decode(self, denoiser: Denoiser, context: Any, z: Float[Tensor, "b z"]) -> Float[Tensor, "b k a"]:
        x_t = rearrange(self.latent_proj(z), "b (k a) -> b k a", a=self.action_dim)
        return denoiser(x_t, torch.zeros_like(x_t[:, 0, 0]), context)


class Posterior(nn.Module):
    """Mean and log-variance of q(z | actions), from a transformer over [CLS, actions]. A step with nothing
    visible is not attended to; a hidden element of another step reads as 0, the normalised middle."""

    def __init__(
        self, horizon: int, action_dim: int, latent_dim: int, num_layers: int, layer: LayerOptions
    ) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, layer.width))
        self.action_proj = nn.Linear(action_dim, layer.width)
        self.encoder = Encoder(num_layers, layer)
        self.out_proj = nn.Linear(layer.width, 2 * latent_dim)
        self.register_buffer("positions", sine_table(1 + horizon, layer.width)[None], persistent=False)

    def forward(
        self, actions: Float[Tensor, "b k a"], visible: Bool[Tensor, "b k a"]
    ) -> tuple[Float[Tensor, "b z"], Float[Tensor, "b z"]]:
        start = repeat(self.cls, "one d -> b one d", b=len(actions))
        tokens = torch.cat((start, self.action_proj(actions.masked_fill(~visible, 0.0))), dim=1)
        real = torch.cat((visible.new_ones(len(actions), 1), visible.any(dim=-1)), dim=1)
        mean, log_variance = self.out_proj(self.encoder(tokens, self.positions, real)[:, 0]).chunk(2, dim=-1)
        return mean, log_variance
