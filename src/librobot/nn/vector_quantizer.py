"""Vector quantisation with a straight-through gradient (VQ-VAE, van den Oord et al. 2017)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional


class Quantized(NamedTuple):
    """`values` are the nearest codebook vectors, `codes` their numbers, `loss` the mean of what trains both
    sides."""

    values: Float[Tensor, "*batch d"]
    codes: Int[Tensor, "*batch"]
    loss: Float[Tensor, ""]


class VectorQuantizer(nn.Module):
    """Replaces each vector by the nearest (Euclidean) of `num_codes` learned ones.

    The gradient passes straight through to the input. The codebook learns from
    ||sg(z) - e||^2 + commitment * ||z - sg(e)||^2 (equation 3), as a mean over vectors and dimensions,
    where sg stops the gradient. Codes start at about the size of a fresh network's outputs: larger ones are
    out of reach of most inputs, and few are ever used.
    """

    def __init__(self, num_codes: int, width: int, *, commitment: float = 0.25) -> None:
        super().__init__()
        if num_codes < 2:
            raise ValueError(f"num_codes must be at least 2, found {num_codes}")
        if commitment < 0:
            raise ValueError(f"commitment must be at least 0, found {commitment}")
        self.commitment = commitment
        self.codebook = nn.Embedding(num_codes, width)
        nn.init.normal_(self.codebook.weight, std=0.1)

    def forward(self, z: Float[Tensor, "*batch d"]) -> Quantized:
        exact, codebook = z.float(), self.codebook.weight.float()
        codes = torch.cdist(exact.flatten(0, -2), codebook).argmin(dim=-1).view(z.shape[:-1])
        nearest = codebook[codes]
        loss = functional.mse_loss(nearest, exact.detach())
        loss = loss + self.commitment * functional.mse_loss(exact, nearest.detach())
        return Quantized((exact + (nearest - exact).detach()).to(z.dtype), codes, loss)


def perplexity(codes: Int[Tensor, "*batch"], num_codes: int) -> Float[Tensor, ""]:
    """exp(entropy) of how often codes are used: 1 where all are the same, `num_codes` where all are equally
    frequent."""
    share = torch.bincount(codes.flatten(), minlength=num_codes).float() / codes.numel()
    return torch.special.entr(share).sum().exp()
