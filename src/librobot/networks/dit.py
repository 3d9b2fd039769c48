"""Diffusion transformer (Peebles and Xie 2023) over the actions of a chunk, with attention to the context.

The form of the action experts of GR00T N1 (Bjorck et al. 2025) and RDT-1B (Liu et al. 2025).
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

from jaxtyping import Bool, Float
from torch import Tensor, nn

from librobot.networks.base import ContextTokens, Network, Sizes
from librobot.networks.inputs import ActionTokens, ContextPool, ContextTokenProjection, TimeMLP
from librobot.nn.adaln import AdaLN
from librobot.nn.cross_attention import CrossAttention

CrossAttentionPattern = Literal["every", "alternate"]
Modulation = Literal["adaln_zero", "adaln"]


class DiTBlock(nn.Module):
    """Self-attention over the actions, attention to the context, an MLP: each a residual branch behind a norm
    that the condition modulates. `self_attention` or `cross_attention` can be left out."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_width: int,
        *,
        condition_width: int,
        gated: bool = True,
        self_attention: bool = True,
        cross_attention: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.self_attention = self.cross_attention = None
        if self_attention:
            self.norm_self = AdaLN(width, condition_width, gated=gated)
            self.self_attention = CrossAttention(width, num_heads)
        if cross_attention:
            self.norm_cross = AdaLN(width, condition_width, gated=gated)
            self.cross_attention = CrossAttention(width, num_heads)
        self.norm_mlp = AdaLN(width, condition_width, gated=gated)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_width), nn.GELU(approximate="tanh"), nn.Linear(mlp_width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b k d"],
        condition: Float[Tensor, "b d"] | None,
        context: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"],
    ) -> Float[Tensor, "b k d"]:
        if self.self_attention is not None:
            y, gate = self.norm_self(x, condition)
            x = x + gate * self.dropout(self.self_attention(y, y))
        if self.cross_attention is not None:
            y, gate = self.norm_cross(x, condition)
            x = x + gate * self.dropout(self.cross_attention(y, context, mask=mask[:, None]))
        y, gate = self.norm_mlp(x, condition)
        return x + gate * self.dropout(self.mlp(y))


class DiT(Network):
    """`num_layers` blocks, then a modulated norm and a linear layer.

    `cross_attention`: `every` block has self- and cross-attention; with `alternate` blocks have one of them
    in turn, cross-attention first (GR00T). The condition is the time, plus with `pool_context` the mean of
    the context's tokens. `modulation`: `adaln_zero` starts every block as the identity, so that in the first
    step no gradient passes the shut gates; `adaln` has no gates (GR00T). Heads without noise have no time:
    their condition is the pooled context, or else there is none, and norms are plain ones.

    Unlike the paper's, the last layer doesn't start at zero.
    """

    kind: ClassVar[Literal["denoiser"]] = "denoiser"

    def __init__(
        self,
        *,
        sizes: Sizes,
        width: int = 512,
        num_layers: int = 8,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        cross_attention: CrossAttentionPattern = "every",
        modulation: Modulation = "adaln_zero",
        pool_context: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value, options in (
            ("cross_attention", cross_attention, get_args(CrossAttentionPattern)),
            ("modulation", modulation, get_args(Modulation)),
        ):
            if value not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}, found {value!r}")
        least = 2 if cross_attention == "alternate" else 1
        if num_layers < least:
            raise ValueError(
                f"num_layers must be at least {least} with cross_attention={cross_attention}, "
                f"found {num_layers}"
            )
        self.action_tokens = ActionTokens(sizes, width)
        self.time_mlp = TimeMLP(width) if sizes.takes_noise else None
        self.context_pool = ContextPool(sizes, width) if pool_context else None
        self.context_proj = ContextTokenProjection(sizes, width)
        self.context_norm = nn.LayerNorm(width)
        condition_width = width if sizes.takes_noise or pool_context else 0
        every = cross_attention == "every"
        self.blocks = nn.ModuleList(
            DiTBlock(
                width,
                num_heads,
                int(mlp_ratio * width),
                condition_width=condition_width,
                gated=modulation == "adaln_zero",
                self_attention=every or i % 2 == 1,
                cross_attention=every or i % 2 == 0,
                dropout=dropout,
            )
            for i in range(num_layers)
        )
        self.norm_out = AdaLN(width, condition_width, gated=False)
        self.output_proj = nn.Linear(width, sizes.output_width)

    def forward(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], context: ContextTokens
    ) -> Float[Tensor, "b k o"]:
        x = self.action_tokens(x_t)
        condition = self.condition(time, context)
        tokens = self.context_norm(self.context_proj(context))
        for block in self.blocks:
            x = block(x, condition, tokens, context.mask)
        return self.output_proj(self.norm_out(x, condition)[0])

    def condition(self, time: Float[Tensor, " b"], context: ContextTokens) -> Float[Tensor, "b d"] | None:
        """What modulates the norms; None where nothing does."""
        embedded = None if self.time_mlp is None else self.time_mlp(time)
        if self.context_pool is None:
            return embedded
        pooled = self.context_pool(context)
        return pooled if embedded is None else embedded + pooled
