"""Attention from one sequence to another, and the residual block around it."""

from __future__ import annotations

import math

from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from librobot.nn.attention import GatedMLP

KeysValues = tuple[Float[Tensor, "b h l e"], Float[Tensor, "b h l e"]]


class CrossAttention(nn.Module):
    """Multi-head attention without positions of its own, on torch's fused kernels.

    `context_width` is that of what is read (None: `width`); `offsets` gives the linear maps biases.
    """

    def __init__(
        self, width: int, num_heads: int, *, context_width: int | None = None, offsets: bool = False
    ) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"num_heads must divide the width of {width}, found {num_heads}")
        self.num_heads = num_heads
        read = width if context_width is None else context_width
        self.q_proj = nn.Linear(width, width, bias=offsets)
        self.k_proj = nn.Linear(read, width, bias=offsets)
        self.v_proj = nn.Linear(read, width, bias=offsets)
        self.o_proj = nn.Linear(width, width, bias=offsets)

    def keys_values(self, context: Float[Tensor, "b l c"]) -> KeysValues:
        """What `forward` makes of a context: to be computed once where the same one is read several times."""
        keys, values = (
            rearrange(y, "b l (h e) -> b h l e", h=self.num_heads)
            for y in (self.k_proj(context), self.v_proj(context))
        )
        return keys, values

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        context: Float[Tensor, "b l c"] | KeysValues,
        *,
        mask: Bool[Tensor, "#b #q l"] | None = None,
        bias: Float[Tensor, "#b #h q l"] | None = None,
    ) -> Float[Tensor, "b q d"]:
        """Read `context` (l at least 1), or the `keys_values` of it, from `x`.

        `mask` is True where a query may read a key; a query that may read nothing gets zeros. `bias` is added
        to the logits (ALiBi). Without either, torch can take its flash kernel.
        """
        queries = rearrange(self.q_proj(x), "b q (h e) -> b h q e", h=self.num_heads)
        keys, values = context if isinstance(context, tuple) else self.keys_values(context)
        admitted: Tensor | None = None if bias is None else bias.to(queries.dtype)
        if mask is not None:
            # A row without any key is undefined in softmax: it reads all, and is set to zero below.
            blind = ~mask.any(dim=-1, keepdim=True)
            visible = (mask | blind)[:, None]
            admitted = visible if admitted is None else admitted.masked_fill(~visible, -math.inf)
        out = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=admitted)
        if mask is not None:
            out = out.masked_fill(blind[:, None], 0.0)
        return self.o_proj(rearrange(out, "b h q e -> b q (h e)"))


class CrossAttentionBlock(nn.Module):
    """x + attention(norm(x), norm(context)), then x + mlp(norm(x)). A context of `x` makes it self-attention.

    `gated` multiplies both branches by tanh of a learned number that starts at zero, so that the block starts
    as the identity (Flamingo, Alayrac et al. 2022, section 2.2).
    """

    def __init__(self, width: int, num_heads: int, mlp_width: int, *, gated: bool = False) -> None:
        super().__init__()
        self.norm_x = nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width)
        self.attention = CrossAttention(width, num_heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = GatedMLP(width, mlp_width)
        self.gates = nn.Parameter(self.norm_x.weight.new_zeros(2)) if gated else None

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        context: Float[Tensor, "b l d"],
        *,
        mask: Bool[Tensor, "#b #q l"] | None = None,
        bias: Float[Tensor, "#b #h q l"] | None = None,
    ) -> Float[Tensor, "b q d"]:
        gate_attention, gate_mlp = (1.0, 1.0) if self.gates is None else self.gates.tanh()
        read = self.attention(self.norm_x(x), self.norm_context(context), mask=mask, bias=bias)
        x = x + gate_attention * read
        return x + gate_mlp * self.mlp(self.norm_mlp(x))
