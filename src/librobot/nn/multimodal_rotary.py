"""M-RoPE: rotary positions in time, height and width (Qwen2-VL, Wang et al. 2024, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def multimodal_rotary_angles(
    positions: Int[Tensor, "3 b l"], head_dim: int, sections: Sequence[int], theta: float = 10_000.0
) -> tuple[Float[Tensor, "b 1 l e"], Float[Tensor, "b 1 l e"]]:
    """Cosine and sine tables in float32, for `librobot.nn.positions.apply_rotary` and `Attention`.

    `positions` are each token's time, height and width; a token of text has the same number three times, and
    then this is plain RoPE. `sections` says how many of the head_dim / 2 frequencies, from the fastest on,
    turn with time, with height and with width (Qwen2-VL: 16, 24, 24 of 64).
    """
    if head_dim % 2 or len(sections) != 3 or sum(sections) != head_dim // 2:
        raise ValueError(
            f"sections must be three numbers that sum to half of head_dim={head_dim}, found {list(sections)}"
        )
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(sections)).to(positions.device)
    # The position that turns each frequency: (f, b, l), moved to (b, 1, l, f).
    angles = positions[axis].movedim(0, -1)[:, None].float() * frequency
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()
