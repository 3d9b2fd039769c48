"""A sequence of tokens as a vector that keeps several things apart."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from librobot.nn.cross_attention import CrossAttention


class Readout(nn.Module):
    """`num_queries` learned queries attend to the tokens; what they read stands side by side."""

    def __init__(self, token_width: int, *, width: int, num_queries: int, num_heads: int) -> None:
        super().__init__()
        self.width = num_queries * width
        self.queries = nn.Parameter(torch.randn(num_queries, width))
        self.proj = nn.Linear(token_width, width)
        self.norm = nn.LayerNorm(width)
        self.attention = CrossAttention(width, num_heads)

    def forward(self, tokens: Float[Tensor, "b l e"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b f"]:
        context = self.norm(self.proj(tokens.to(self.proj.weight.dtype)))
        queries = repeat(self.queries, "q d -> b q d", b=len(context))
        return rearrange(self.attention(queries, context, mask=mask[:, None]), "b q d -> b (q d)")
