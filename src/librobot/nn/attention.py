"""Attention with grouped key-value heads, and the masks that say who sees whom."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from librobot.nn.positions import apply_rotary

Angles = tuple[Float[Tensor, "b 1 l e"], Float[Tensor, "b 1 l e"]]


def block_mask(
    query_blocks: Int[Tensor, "b q"], key_blocks: Int[Tensor, "b l"], key_mask: Bool[Tensor, "b l"]
) -> Bool[Tensor, "b q l"]:
    """A query sees the real keys of its own and of earlier blocks.

    One number for all tokens makes attention bidirectional, a running count makes it causal, and pi0's
    0 (prefix), 1 (state), 2 (actions) lies between (openpi `make_attn_mask`).
    """
    return (key_blocks[:, None, :] <= query_blocks[:, :, None]) & key_mask[:, None, :]


def with_self(mask: Bool[Tensor, "b l l"]) -> Bool[Tensor, "b l l"]:
    """The same mask, with every token allowed to see itself: no row of a padding token is then empty."""
    return mask | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)


def grouped_attention(
    queries: Float[Tensor, "b n q e"],
    keys: Float[Tensor, "b h l e"],
    values: Float[Tensor, "b h l e"],
    mask: Bool[Tensor, "#b 1 #q l"] | Float[Tensor, "#b 1 #q l"],
) -> Float[Tensor, "b n q e"]:
    """Scaled dot-product attention in which n / h neighbouring query heads share a key-value head.

    The heads that share one become further queries of it, so that keys and values are never repeated. `mask`
    is True where a query may look, or what is added to the scores.
    """
    b, num_heads, num_queries, _ = queries.shape
    group = num_heads // keys.shape[1]
    if group > 1:
        queries = queries.reshape(b, keys.shape[1], group * num_queries, -1)
        mask = mask if mask.shape[2] == 1 else mask.repeat(1, 1, group, 1)
    out = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    return out.reshape(b, num_heads, num_queries, -1)


ATTENTION_PLAN = {"q_proj": "column", "k_proj": "column", "v_proj": "column", "o_proj": "row"}
MLP_PLAN = {"gate": "column", "up": "column", "down": "row"}
"""How tensor parallelism splits an `Attention` (by heads) and a `GatedMLP`: see `frameworks.sharding`."""


def block_plan(attention: str = "attention", mlp: str = "mlp") -> dict[str, str]:
    """The plan of a block that has both, under these names."""
    plans = ((attention, ATTENTION_PLAN), (mlp, MLP_PLAN))
    return {f"{name}.{part}": how for name, plan in plans for part, how in plan.items()}


class Attention(nn.Module):
    """Multi-head attention with rotary positions, over own tokens and, optionally, over cached ones.

    `num_kv_heads` below `num_heads` shares each key-value head between several query heads (Ainslie et al.
    2023). The inner width is `num_heads * head_dim`, which may differ from `width`.
    """

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, found {num_heads} and {num_kv_heads}"
            )
        if head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, found {head_dim}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = nn.Linear(width, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, width, bias=False)

    def keys_values(
        self, x: Float[Tensor, "b l d"], angles: Angles
    ) -> tuple[Float[Tensor, "b h l e"], Float[Tensor, "b h l e"]]:
        """Rotated keys, and values: what a cache holds."""
        return apply_rotary(self._heads(self.k_proj(x)), angles), self._heads(self.v_proj(x))

    def queries_keys_values(
        self, x: Float[Tensor, "b l d"], angles: Angles
    ) -> tuple[Float[Tensor, "b n l e"], Float[Tensor, "b h l e"], Float[Tensor, "b h l e"]]:
        """Rotated queries, and what `keys_values` gives; one rotation for both."""
        both = self.q_proj(x), self.k_proj(x)
        turned = apply_rotary(self._heads(torch.cat(both, dim=-1)), angles)
        # Counted, not num_heads and num_kv_heads: of an attention over several processes this one has a part.
        queries, keys = turned.split([y.shape[-1] // self.head_dim for y in both], dim=1)
        return queries, keys, self._heads(self.v_proj(x))

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        angles: Angles,
        keys: Float[Tensor, "b h l e"],
        values: Float[Tensor, "b h l e"],
        mask: Bool[Tensor, "b q l"],
    ) -> Float[Tensor, "b q d"]:
        """Attend from `x` to `keys` and `values`: the caller's own `keys_values`, after any cached ones."""
        queries = apply_rotary(self._heads(self.q_proj(x)), angles)
        return self.output(grouped_attention(queries, keys, values, mask[:, None]))

    def output(self, attended: Float[Tensor, "b n q e"]) -> Float[Tensor, "b q d"]:
        """The heads' results as one."""
        return self.o_proj(rearrange(attended, "b n q e -> b q (n e)"))

    def _heads(self, x: Float[Tensor, "b l w"]) -> Float[Tensor, "b n l e"]:
        return rearrange(x, "b l (n e) -> b n l e", e=self.head_dim)


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020): SwiGLU with SiLU, Gemma's GeGLU with tanh-GELU."""

    def __init__(self, width: int, hidden: int, activation: str = "silu") -> None:
        super().__init__()
        activations = {"silu": nn.SiLU(), "gelu": nn.GELU(approximate="tanh")}
        if activation not in activations:
            raise ValueError(f"activation must be one of {sorted(activations)}, found {activation!r}")
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.activation = activations[activation]

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self.down(self.activation(self.gate(x)) * self.up(x))
