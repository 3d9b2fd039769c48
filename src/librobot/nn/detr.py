"""DETR's transformer (Carion et al. 2020), used by ACT: positions enter every layer's queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


@dataclass(frozen=True)
class LayerOptions:
    """What all layers of a transformer share. Norms stand after each sum unless `pre_norm`."""

    width: int
    num_heads: int
    feedforward_width: int
    dropout: float = 0.1
    activation: str = "relu"
    pre_norm: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, found {self.activation!r}")
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads, found {self.width} and {self.num_heads}"
            )


def attention(options: LayerOptions) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(options.width, options.num_heads, dropout=options.dropout, batch_first=True)


FEED_FORWARD_PLAN = {"feed_forward.0": "column", "feed_forward.3": "row"}
"""What tensor parallelism splits of a layer; torch's MultiheadAttention it does not."""


class FeedForward(nn.Sequential):
    """Linear, activation, dropout, linear."""

    def __init__(self, options: LayerOptions) -> None:
        super().__init__(
            nn.Linear(options.width, options.feedforward_width),
            ACTIVATIONS[options.activation](),
            nn.Dropout(options.dropout),
            nn.Linear(options.feedforward_width, options.width),
        )


class Residual(nn.Module):
    """x + dropout(f(x)), with the norm after the sum (DETR's default) or before f."""

    def __init__(self, options: LayerOptions) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(options.width)
        self.dropout = nn.Dropout(options.dropout)
        self.pre_norm = options.pre_norm

    def enter(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        """What f sees of `x`."""
        return self.norm(x) if self.pre_norm else x

    def leave(self, x: Float[Tensor, "b l d"], y: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        """`x` with f's output `y` added."""
        x = x + self.dropout(y)
        return x if self.pre_norm else self.norm(x)


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network."""

    tensor_plan = FEED_FORWARD_PLAN

    def __init__(self, options: LayerOptions) -> None:
        super().__init__()
        self.attention = attention(options)
        self.feed_forward = FeedForward(options)
        self.around_attention = Residual(options)
        self.around_feed_forward = Residual(options)

    def forward(
        self, x: Float[Tensor, "b l d"], positions: Float[Tensor, "#b l d"], mask: Bool[Tensor, "b l"]
    ) -> Float[Tensor, "b l d"]:
        seen = self.around_attention.enter(x)
        placed = seen + positions
        y, _ = self.attention(placed, placed, seen, key_padding_mask=~mask, need_weights=False)
        x = self.around_attention.leave(x, y)
        return self.around_feed_forward.leave(x, self.feed_forward(self.around_feed_forward.enter(x)))


class Encoder(nn.Module):
    """Layers of self-attention, with a final norm where the layers are pre-norm."""

    def __init__(
        self,
        num_layers: int,
        options: LayerOptions,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(options) for _ in range(num_layers))
        self.norm = nn.LayerNorm(options.width) if options.pre_norm else nn.Identity()

    def forward(
        self, x: Float[Tensor, "b l d"], positions: Float[Tensor, "#b l d"], mask: Bool[Tensor, "b l"]
    ) -> Float[Tensor, "b l d"]:
        for layer in self.layers:
            x = layer(x, positions, mask)
        return self.norm(x)


class DecoderLayer(nn.Module):
    """Self-attention among the queries, attention to the encoder's memory, a feed-forward network."""

    tensor_plan = FEED_FORWARD_PLAN

    def __init__(self, options: LayerOptions) -> None:
        super().__init__()
        self.self_attention = attention(options)
        self.cross_attention = attention(options)
        self.feed_forward = FeedForward(options)
        self.around_self_attention = Residual(options)
        self.around_cross_attention = Residual(options)
        self.around_feed_forward = Residual(options)

    def forward(
        self,
        x: Float[Tensor, "b k d"],
        queries: Float[Tensor, "k d"],
        memory: Float[Tensor, "b l d"],
        memory_positions: Float[Tensor, "#b l d"],
        memory_mask: Bool[Tensor, "b l"],
    ) -> Float[Tensor, "b k d"]:
        seen = self.around_self_attention.enter(x)
        placed = seen + queries
        y, _ = self.self_attention(placed, placed, seen, need_weights=False)
        x = self.around_self_attention.leave(x, y)
        seen = self.around_cross_attention.enter(x)
        y, _ = self.cross_attention(
            seen + queries,
            memory + memory_positions,
            memory,
            key_padding_mask=~memory_mask,
            need_weights=False,
        )
        x = self.around_cross_attention.leave(x, y)
        return self.around_feed_forward.leave(x, self.feed_forward(self.around_feed_forward.enter(x)))


class Decoder(nn.Module):
    """Decoder layers and, always, a final norm."""

    def __init__(
        self,
        num_layers: int,
        options: LayerOptions,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(options) for _ in range(num_layers))
        self.norm = nn.LayerNorm(options.width)

    def forward(
        self,
        x: Float[Tensor, "b k d"],
        queries: Float[Tensor, "k d"],
        memory: Float[Tensor, "b l d"],
        memory_positions: Float[Tensor, "#b l d"],
        memory_mask: Bool[Tensor, "b l"],
    ) -> Float[Tensor, "b k d"]:
        for layer in self.layers:
            x = layer(x, queries, memory, memory_positions, memory_mask)
        return self.norm(x)
