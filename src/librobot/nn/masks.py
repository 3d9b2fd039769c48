"""Who sees whom, from positions: masks that are True where a query may read a key, to combine with & and |.

    causal(q, k) & sliding_window(q, k, 3)                               Mistral (Jiang et al. 2023)
    causal(q, k) & (sliding_window(q, k, 3) | attention_sinks(q, k, 1))  StreamingLLM (Xiao et al. 2024)
    mask & key_mask[:, None, :]                                          without padding

Drawings show queries as rows and keys as columns, x where a query sees a key. `block_mask` in
`librobot.nn.attention` is the one for blocks of unequal sizes.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from librobot.nn.attention import block_mask


def causal(query_positions: Int[Tensor, "b q"], key_positions: Int[Tensor, "b l"]) -> Bool[Tensor, "b q l"]:
    """A query sees its own position and all earlier ones.

    x . . .
    x x . .
    x x x .
    x x x x
    """
    return key_positions[:, None, :] <= query_positions[:, :, None]


def sliding_window(
    query_positions: Int[Tensor, "b q"], key_positions: Int[Tensor, "b l"], window: int
) -> Bool[Tensor, "b q l"]:
    """A query sees what is fewer than `window` positions away, on both sides. With window 2:

        x x . .
        x x x .
        . x x x
        . . x x

    `& causal(...)` leaves the last `window` positions, the query's own among them.
    """
    _at_least_one("window", window)
    return (query_positions[:, :, None] - key_positions[:, None, :]).abs() < window


def attention_sinks(
    query_positions: Int[Tensor, "b q"], key_positions: Int[Tensor, "b l"], num_sinks: int
) -> Bool[Tensor, "b q l"]:
    """Every query sees the first `num_sinks` positions, later or not. With one sink:

        x . . .
        x . . .
        x . . .
        x . . .

    They are meant for `|` with a sliding window, which alone loses the tokens that attention rests on (Xiao
    et al. 2024, section 3.1).
    """
    _at_least_one("num_sinks", num_sinks)
    sinks = key_positions[:, None, :] < num_sinks
    return sinks.expand(-1, query_positions.shape[1], -1)


def block_wise(
    query_positions: Int[Tensor, "b q"], key_positions: Int[Tensor, "b l"], block_size: int
) -> Bool[Tensor, "b q l"]:
    """A query sees all of its own block of `block_size` positions and of the blocks before. With size 2:

    x x . .
    x x . .
    x x x x
    x x x x
    """
    _at_least_one("block_size", block_size)
    everywhere = torch.ones_like(key_positions, dtype=torch.bool)
    return block_mask(query_positions // block_size, key_positions // block_size, everywhere)


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, found {value}")
