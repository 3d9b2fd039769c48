"""Vector quantisation with a straight-through gradient (VQ-VAE, van den Oord et al. 2017), also residual."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional


class Quantized(NamedTuple):
    """`values` are the nearest codebook vectors, `codes` their numbers (one more axis where there are several
    codebooks), `loss` the mean of what trains both sides."""

    values: Float[Tensor, "*batch d"]
    codes: Int[Tensor, "*codes"]
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
        codes = nearest(exact, codebook)
        values = codebook[codes]
        loss = functional.mse_loss(values, exact.detach())
        loss = loss + self.commitment * functional.mse_loss(exact, values.detach())
        return Quantized((exact + (values - exact).detach()).to(z.dtype), codes, loss)


class ResidualQuantizer(nn.Module):
    """`num_quantizers` codebooks of `num_codes` vectors, each for what the ones before it leave of a vector
    (SoundStream, Zeghidour et al. 2021, algorithm 1).

    No gradient trains the codebooks: `learn` moves each code to the mean of the vectors that take it, as a
    moving average with `decay` (van den Oord et al. 2017, appendix A.1). The gradient passes straight through
    to the input, and `loss` is the sum over codebooks of ||r - sg(e)||^2, r what was left, as a mean over
    vectors and dimensions.
    """

    codebooks: Tensor
    counts: Tensor

    def __init__(
        self, num_quantizers: int, num_codes: int, width: int, *, decay: float = 0.8, dead_below: float = 0.1
    ) -> None:
        super().__init__()
        if num_quantizers < 1:
            raise ValueError(f"num_quantizers must be at least 1, found {num_quantizers}")
        if num_codes < 2:
            raise ValueError(f"num_codes must be at least 2, found {num_codes}")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be at least 0 and below 1, found {decay}")
        self.decay, self.dead_below = decay, dead_below
        self.register_buffer("codebooks", torch.zeros(num_quantizers, num_codes, width))
        self.register_buffer("counts", torch.zeros(num_quantizers, num_codes))

    def forward(self, z: Float[Tensor, "*batch d"]) -> Quantized:
        """`codes` are (*batch, num_quantizers)."""
        left, chosen = z.float(), []
        loss = left.new_zeros(())
        for codebook in self.codebooks.unbind():
            codes = nearest(left, codebook)
            loss = loss + functional.mse_loss(left, codebook[codes])
            left = left - codebook[codes]
            chosen.append(codes)
        exact = z.float()
        return Quantized((exact - left.detach()).to(z.dtype), torch.stack(chosen, -1), loss)

    def encode(self, z: Float[Tensor, "*batch d"]) -> Int[Tensor, "*batch q"]:
        return self(z).codes

    def decode(
        self, codes: Int[Tensor, "*batch q"], known: Bool[Tensor, "*batch q"] | None = None
    ) -> Float[Tensor, "*batch d"]:
        """The sum of the codes' vectors; without those that are not `known`."""
        vectors = torch.stack([book[codes[..., i]] for i, book in enumerate(self.codebooks.unbind())], dim=-2)
        return (vectors if known is None else vectors * known[..., None]).sum(dim=-2)

    @torch.no_grad()
    def start(self, z: Float[Tensor, "n d"], generator: torch.Generator) -> None:
        """Begin with vectors drawn from the data, for each codebook from what the ones before it leave."""
        left = z.float()
        for i in range(len(self.codebooks)):
            self.codebooks[i] = drawn(left, self.codebooks.shape[1], generator)
            self.counts[i] = len(z) / self.codebooks.shape[1]
            left = left - self.codebooks[i][nearest(left, self.codebooks[i])]

    @torch.no_grad()
    def learn(self, z: Float[Tensor, "n d"], generator: torch.Generator, *, restart: bool = True) -> None:
        """One step of the moving averages. With `restart`, a code that takes less than `dead_below` of its
        equal share begins again at a vector drawn from the batch."""
        left, (_, num_codes, _) = z.float(), self.codebooks.shape
        fair = len(z) / num_codes
        for book, counts in zip(self.codebooks.unbind(), self.counts.unbind(), strict=True):
            codes = nearest(left, book)
            taken = torch.bincount(codes, minlength=num_codes).to(counts)
            means = torch.zeros_like(book).index_add_(0, codes, left)
            sums = torch.lerp(means, book * counts[:, None], self.decay)
            after = left - book[codes]
            counts.lerp_(taken, 1 - self.decay)
            alive = counts > 1e-5 * fair
            book.copy_(torch.where(alive[:, None], sums / counts.clamp_min(1e-12)[:, None], book))
            dead = counts < self.dead_below * fair
            if restart and bool(dead.any()):
                book[dead] = drawn(left, int(dead.sum()), generator)
                counts[dead] = fair
            left = after


def nearest(z: Float[Tensor, "*batch d"], codebook: Float[Tensor, "v d"]) -> Int[Tensor, "*batch"]:
    """The number of the nearest (Euclidean) vector of the codebook."""
    return torch.cdist(z.flatten(0, -2), codebook).argmin(dim=-1).view(z.shape[:-1])


def drawn(z: Float[Tensor, "n d"], count: int, generator: torch.Generator) -> Float[Tensor, "count d"]:
    return z[torch.randint(len(z), (count,), generator=generator)]


def perplexity(codes: Int[Tensor, "*batch"], num_codes: int) -> Float[Tensor, ""]:
    """exp(entropy) of how often codes are used: 1 where all are the same, `num_codes` where all are equally
    frequent."""
    share = torch.bincount(codes.flatten(), minlength=num_codes).float() / codes.numel()
    return torch.special.entr(share).sum().exp()
