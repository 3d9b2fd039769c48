"""A causal transformer over tokens, with attention to the context.

The layers are Llama's (Touvron et al. 2023: RMSNorm, rotary positions, SwiGLU) with the cross-attention of
the original decoder (Vaswani et al. 2017) between self-attention and MLP.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from librobot.networks.base import ContextTokens, Network, Sizes
from librobot.networks.inputs import ContextTokenProjection
from librobot.nn.attention import Angles, Attention, GatedMLP
from librobot.nn.masks import causal
from librobot.nn.positions import rotary_angles


class KeysValues(NamedTuple):
    keys: Float[Tensor, "b h l e"]
    values: Float[Tensor, "b h l e"]

    def followed_by(self, later: KeysValues) -> KeysValues:
        return KeysValues(
            torch.cat((self.keys, later.keys), dim=2), torch.cat((self.values, later.values), dim=2)
        )


class DecoderLayer(nn.Module):
    """Self-attention over the tokens so far, attention to the context, a gated MLP; norms stand before."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.norm_self = nn.RMSNorm(width, eps=1e-6)
        self.self_attention = Attention(width, num_heads, num_heads, width // num_heads)
        self.norm_cross = nn.RMSNorm(width, eps=1e-6)
        self.cross_attention = Attention(width, num_heads, num_heads, width // num_heads)
        self.norm_mlp = nn.RMSNorm(width, eps=1e-6)
        self.mlp = GatedMLP(width, mlp_width)
        self.dropout = nn.Dropout(dropout)

    def read(self, context: Float[Tensor, "b l d"], unplaced: Angles) -> KeysValues:
        """What the layer keeps of the context."""
        return KeysValues(*self.cross_attention.keys_values(context, unplaced))

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        angles: Angles,
        mask: Bool[Tensor, "#b q l"],
        past: KeysValues | None,
        seen: KeysValues,
        seen_mask: Bool[Tensor, "b 1 n"],
        unplaced: Angles,
    ) -> tuple[Float[Tensor, "b q d"], KeysValues]:
        """The layer's output, and the keys and values of `past` and `x` together."""
        y = self.norm_self(x)
        own = KeysValues(*self.self_attention.keys_values(y, angles))
        own = own if past is None else past.followed_by(own)
        x = x + self.dropout(self.self_attention(y, angles, own.keys, own.values, mask))
        y = self.norm_cross(x)
        x = x + self.dropout(self.cross_attention(y, unplaced, seen.keys, seen.values, seen_mask))
        return x + self.dropout(self.mlp(self.norm_mlp(x))), own


class CausalDecoder(Network):
    """Logits of each token from the tokens before it and the context; a learned start stands before the
    first. Context tokens carry their own positions."""

    kind: ClassVar[Literal["decoder"]] = "decoder"
    layers: Any  # a ModuleList of DecoderLayer

    def __init__(
        self,
        *,
        sizes: Sizes,
        width: int = 256,
        num_layers: int = 4,
        num_heads: int = 8,
        mlp_width: int = 1024,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or width % (2 * num_heads):
            raise ValueError(
                f"width must be a multiple of 2 * num_heads for rotary positions, found {width} and "
                f"{num_heads}"
            )
        self.max_tokens, self.head_dim = sizes.max_tokens, width // num_heads
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.embed = nn.Embedding(sizes.vocabulary, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.context_proj = ContextTokenProjection(sizes, width)
        self.context_norm = nn.RMSNorm(width, eps=1e-6)
        self.layers = nn.ModuleList(
            DecoderLayer(width, num_heads, mlp_width, dropout) for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.output_proj = nn.Linear(width, sizes.vocabulary, bias=False)

    def forward(self, tokens: Int[Tensor, "b l"], context: ContextTokens) -> Float[Tensor, "b l v"]:
        if tokens.shape[1] > self.max_tokens:
            raise ValueError(
                f"tokens must be at most {self.max_tokens} a sample, as the network was built for, found "
                f"{tokens.shape[1]}"
            )
        state = Decoding(self, context)
        start = repeat(self.start, "d -> b 1 d", b=len(tokens))
        return state.advance(torch.cat((start, self.embed(tokens[:, :-1])), dim=1))

    def begin(self, context: ContextTokens) -> Decoding:
        return Decoding(self, context)


class Decoding:
    """Decoding under way: the keys and values of the context and of the tokens so far, for every layer."""

    def __init__(self, network: CausalDecoder, context: ContextTokens) -> None:
        self.network = network
        self.mask = context.mask[:, None]
        # At position 0 a rotation does nothing: cross-attention has no positions of its own.
        self.unplaced = self._angles(0, 1)
        tokens = network.context_norm(network.context_proj(context))
        self.seen = [layer.read(tokens, self.unplaced) for layer in network.layers]
        self.past: list[KeysValues | None] = [None] * len(network.layers)
        self.length = 0

    def __call__(self, tokens: Int[Tensor, " b"] | None, /) -> Float[Tensor, "b v"]:
        if (tokens is None) != (self.length == 0):
            raise ValueError(
                f"tokens must be None at first and the ones just chosen later, found "
                f"{'None' if tokens is None else 'tokens'} at step {self.length}"
            )
        if tokens is None:
            x = repeat(self.network.start, "d -> b 1 d", b=len(self.mask))
        else:
            x = self.network.embed(tokens)[:, None]
        return self.advance(x)[:, 0]

    def advance(self, x: Float[Tensor, "b q d"]) -> Float[Tensor, "b q v"]:
        """The logits after each of the embeddings `x`, which stand after all before."""
        before, self.length = self.length, self.length + x.shape[1]
        angles = self._angles(before, self.length)
        keys = torch.arange(self.length, device=x.device)[None]
        mask = causal(keys[:, before:], keys)
        for i, layer in enumerate(self.network.layers):
            x, self.past[i] = layer(x, angles, mask, self.past[i], self.seen[i], self.mask, self.unplaced)
        return self.network.output_proj(self.network.norm(x))

    def _angles(self, first: int, end: int) -> Angles:
        positions = torch.arange(first, end, device=self.network.start.device)[None]
        return rotary_angles(positions, self.network.head_dim)
