"""ALiBi (Press et al. 2022): attention falls off linearly with distance, at a rate of each head's own."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def alibi_slopes(num_heads: int) -> Float[Tensor, " h"]:
    """The heads' rates: 2^(-8 i / h) for i = 1 .. h where h is a power of two (section 3).

    Other counts take the slopes of the next smaller power of two, then every other slope of twice that power
    (the rule of the authors' code). Where h is no power of two, the slopes are therefore not sorted.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, found {num_heads}")
    power = 2 ** (num_heads.bit_length() - 1)
    finer = _geometric(2 * power)[::2]
    return torch.cat((_geometric(power), finer[: num_heads - power])).float()


def alibi_bias(
    num_heads: int, query_positions: Int[Tensor, "b q"], key_positions: Int[Tensor, "b l"]
) -> Float[Tensor, "b h q l"]:
    """-slope * |query position - key position|, in float32: what is added to attention's logits."""
    distance = (query_positions[:, :, None] - key_positions[:, None, :]).abs().float()
    slopes = alibi_slopes(num_heads).to(distance.device)
    return -slopes[:, None, None] * distance[:, None]


def _geometric(count: int) -> Float[Tensor, " h"]:
    return 2.0 ** (-8.0 / count * torch.arange(1, count + 1, dtype=torch.float64))
