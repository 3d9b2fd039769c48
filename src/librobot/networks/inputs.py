"""What goes into a denoiser: the chunk as tokens, the time, and the context as tokens or as one vector."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from librobot.networks.base import ContextTokens, Sizes
from librobot.nn.cross_attention import CrossAttention
from librobot.nn.pooling import mean_of_real
from librobot.nn.positions import time_embedding

Pool = Literal["mean", "attention"]


class ActionTokens(nn.Module):
    """A token per action of the chunk: its learned position, plus the noisy action where the head has one."""

    def __init__(self, sizes: Sizes, width: int) -> None:
        super().__init__()
        self.horizon = sizes.horizon
        self.positions = nn.Parameter(0.02 * torch.randn(sizes.horizon, width))
        self.action_proj = nn.Linear(sizes.action_dim, width) if sizes.takes_noise else None

    def forward(self, x_t: Float[Tensor, "b k a"]) -> Float[Tensor, "b k d"]:
        check_horizon(x_t, self.horizon)
        positions = repeat(self.positions, "k d -> b k d", b=len(x_t))
        return positions if self.action_proj is None else positions + project(self.action_proj, x_t)


class TimeMLP(nn.Module):
    """A time in [0, 1] as a vector: sines and cosines, then two linear layers with SiLU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"width must be even for the time's sines and cosines, found {width}")
        self.enter = nn.Linear(width, width)
        self.leave = nn.Linear(width, width)

    def forward(self, time: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        embedded = time_embedding(time, self.enter.in_features)
        return self.leave(nn.functional.silu(project(self.enter, embedded)))


class ContextTokenProjection(nn.Linear):
    """The context's tokens in a network's own width and precision."""

    def __init__(self, sizes: Sizes, width: int) -> None:
        super().__init__(sizes.context_width, width)

    def forward(self, context: ContextTokens) -> Float[Tensor, "b l d"]:  # type: ignore[override]
        return super().forward(context.values.to(self.weight.dtype))


class ContextPool(nn.Module):
    """The context as one vector.

    `mean` is that of the real tokens, projected. `attention` lets one learned query read the projected
    tokens, with `num_heads` heads.
    """

    def __init__(self, sizes: Sizes, width: int, *, pool: Pool = "mean", num_heads: int = 1) -> None:
        super().__init__()
        if pool not in get_args(Pool):
            raise ValueError(f"pool must be one of {', '.join(get_args(Pool))}, found {pool!r}")
        self.proj = nn.Linear(sizes.context_width, width)
        self.query: nn.Parameter | None = None
        if pool == "attention":
            self.query = nn.Parameter(torch.randn(width))
            self.norm = nn.LayerNorm(width)
            self.attention = CrossAttention(width, num_heads)

    def forward(self, context: ContextTokens) -> Float[Tensor, "b d"]:
        if self.query is None:
            return project(self.proj, mean_of_real(context.values, context.mask))
        tokens = self.norm(project(self.proj, context.values))
        query = repeat(self.query, "d -> b 1 d", b=len(tokens))
        return self.attention(query, tokens, mask=context.mask[:, None]).squeeze(1)


def project(linear: nn.Linear, x: Float[Tensor, "... e"]) -> Float[Tensor, "... d"]:
    """`linear` of x in the layer's own precision: what a head or a framework gives may be in another."""
    return linear(x.to(linear.weight.dtype))


def check_horizon(x_t: Float[Tensor, "b k a"], horizon: int) -> None:
    if x_t.shape[1] != horizon:
        raise ValueError(
            f"x_t must hold {horizon} actions, the horizon that the network was built for, "
            f"found {x_t.shape[1]}"
        )
