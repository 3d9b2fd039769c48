"""GR00T's diffusion transformer (Bjorck et al. 2025, section 2.1): state and action tokens attend in turn to
what the backbone saw and read, and to each other; the step of the denoising modulates every norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from librobot.nn.adaln import AdaLN
from librobot.nn.cross_attention import CrossAttention, KeysValues
from librobot.nn.steps import step_embedding

STEP_CHANNELS = 256


@dataclass
class Sights:
    """The backbone's tokens, and which of them cross-attention may read: `text` (all that stand for no
    picture) and `pictures`, both without padding. None: it may read all, padding included."""

    tokens: Float[Tensor, "b l c"]
    text: Bool[Tensor, "b l"] | None
    pictures: Bool[Tensor, "b l"] | None


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). The first norm is modulated by the condition, the second
    is a plain one; without a condition (`condition_width` 0) both have weights of their own."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        condition_width: int = 0,
        context_width: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm_attention = AdaLN(width, condition_width, gated=False, eps=1e-5, zero=False)
        self.attention = CrossAttention(width, num_heads, context_width=context_width, offsets=True)
        self.drop_attention = nn.Sequential(nn.Dropout(dropout), nn.Dropout(dropout))  # one after another
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=condition_width == 0)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(approximate="tanh"),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        condition: Float[Tensor, "b d"] | None = None,
        context: KeysValues | None = None,
        mask: Bool[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "b q d"]:
        """`context` None is self-attention; `mask` is then over `x` itself."""
        y, _ = self.norm_attention(x, condition)
        read = self.attention(
            y, y if context is None else context, mask=None if mask is None else mask[:, None]
        )
        x = x + self.drop_attention(read)
        return x + self.mlp(self.norm_mlp(x))

    def read(self, tokens: Float[Tensor, "b l c"]) -> KeysValues:
        """What `forward` takes as `context` for these tokens."""
        return self.attention.keys_values(tokens)


class FusionTransformer(nn.Module):
    """Self-attention over the backbone's tokens before the action expert reads them (N1.5, N1.7)."""

    def __init__(self, width: int, num_layers: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout=dropout) for _ in range(num_layers))

    def forward(
        self, x: Float[Tensor, "b l c"], mask: Bool[Tensor, "b l"] | None = None
    ) -> Float[Tensor, "b l c"]:
        for block in self.blocks:
            x = block(x, mask=mask)
        return x


class VisionLanguageDiT(nn.Module):
    """Even blocks attend to the backbone's tokens, odd ones to the suffix itself.

    With `text_every` n, every n-th of the attending blocks, the first among them, reads the tokens that are
    no pictures, the others read the pictures (N1.6, N1.7: n = 2); None lets each read all (N1.5).
    """

    blocks: Any  # a ModuleList of Block

    def __init__(
        self,
        *,
        width: int,
        num_layers: int,
        num_heads: int,
        context_width: int,
        output_width: int,
        dropout: float = 0.0,
        text_every: int | None = None,
    ) -> None:
        super().__init__()
        self.text_every = text_every
        self.time_mlp = nn.Sequential(nn.Linear(STEP_CHANNELS, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            Block(
                width,
                num_heads,
                condition_width=width,
                context_width=None if index % 2 else context_width,
                dropout=dropout,
            )
            for index in range(num_layers)
        )
        self.norm_out = AdaLN(width, width, gated=False, zero=False)
        self.output_proj = nn.Linear(width, output_width)

    def read(self, sights: Sights) -> tuple[KeysValues, ...]:
        """Keys and values of the attending blocks: the same at every step of the denoising."""
        tokens = sights.tokens.to(self.output_proj.weight.dtype)
        return tuple(block.read(tokens) for block in self.blocks[::2])

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        step: Int[Tensor, " b"],
        sights: Sights,
        read: tuple[KeysValues, ...] | None = None,
    ) -> Float[Tensor, "b q o"]:
        """`read` is what `read` gives for `sights`, where it was computed before."""
        read = self.read(sights) if read is None else read
        sines, cosines = step_embedding(step, STEP_CHANNELS, to_the_last=True).chunk(2, dim=-1)
        condition = self.time_mlp(torch.cat((cosines, sines), dim=-1).to(x.dtype))
        for index, block in enumerate(self.blocks):
            if index % 2:
                x = block(x, condition)
            else:
                x = block(x, condition, read[index // 2], self.mask(index // 2, sights))
        return self.output_proj(self.norm_out(x, condition)[0])

    def mask(self, number: int, sights: Sights) -> Bool[Tensor, "b l"] | None:
        """What the attending block of this number may read."""
        if sights.text is None or sights.pictures is None:
            return None
        if self.text_every is None:
            return sights.text | sights.pictures
        return sights.text if number % self.text_every == 0 else sights.pictures
