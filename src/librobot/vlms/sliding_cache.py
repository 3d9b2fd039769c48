"""A cache of bounded size for long histories: attention sinks and a sliding window (Xiao et al. 2024,
arXiv 2309.17453, StreamingLLM)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from librobot.nn.positions import apply_rotary, rotary_angles
from librobot.vlms.base import Geometry


class SlidingCache(Cache):
    """Keeps the keys and values of the first `num_sinks` and of the last `window` tokens, for every layer.

    A kept token's position is its place in the cache, not its place in the history, as in the paper's
    section 3.2: what left the window leaves no gap. Keys come rotated by the position that their token had
    when it was new, and are turned on to their present one when they are read. Positions on several axes
    (M-RoPE) move together, so that a picture keeps its shape.

        positions = cache.make_room(n)      # (n,): of the n tokens that come next
        model(..., position_ids=positions, past_key_values=cache)

    Every layer has to run once between two calls of `make_room`. Memory does not grow beyond
    `num_sinks + window` tokens, the new ones included.
    """

    def __init__(self, geometry: Geometry, num_sinks: int = 4, window: int = 512) -> None:
        if num_sinks < 0 or window < 1:
            raise ValueError(f"num_sinks must be at least 0 and window 1, found {num_sinks} and {window}")
        super().__init__(layers=[DynamicLayer() for _ in range(geometry.num_layers)])
        self.geometry = geometry
        self.num_sinks = num_sinks
        self.capacity = num_sinks + window
        self.length = 0
        self.moved = torch.zeros(0, dtype=torch.long)  # how far each kept token's position has moved
        self.keys: list[Tensor | None] = [None] * geometry.num_layers
        self.values: list[Tensor | None] = [None] * geometry.num_layers

    def make_room(self, count: int) -> Int[Tensor, " n"]:
        """Forget what has to go for `count` new tokens; the positions of the new ones."""
        if not 1 <= count <= self.capacity - self.num_sinks:
            raise ValueError(
                f"between 1 and {self.capacity - self.num_sinks} tokens (the window) fit at once, "
                f"found {count}"
            )
        self.length = int(self.moved.numel())
        gone = max(0, self.length + count - self.capacity)
        if gone:
            kept = torch.cat((torch.arange(self.num_sinks), torch.arange(self.num_sinks + gone, self.length)))
            self.keys = [None if key is None else key[:, :, kept] for key in self.keys]
            self.values = [None if value is None else value[:, :, kept] for value in self.values]
            self.moved = self.moved[kept]
            self.moved[self.num_sinks :] -= gone
            self.length -= gone
        self.moved = torch.cat((self.moved, torch.zeros(count, dtype=torch.long)))
        return torch.arange(self.length, self.length + count)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "b h l e"], Float[Tensor, "b h l e"]]:
        """All keys at their present positions, and all values, those of the new tokens included."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if keys is not None and values is not None:
            key_states = torch.cat((keys, key_states), dim=2)
            value_states = torch.cat((values, value_states), dim=2)
        if key_states.shape[2] != len(self.moved):
            raise RuntimeError(
                f"layer {layer_idx} holds {key_states.shape[2]} tokens, expected {len(self.moved)}: call "
                f"make_room with the number of new tokens before each pass"
            )
        self.keys[layer_idx], self.values[layer_idx] = key_states, value_states
        moved = self.moved.to(key_states.device)[None]
        angles = rotary_angles(moved, self.geometry.head_dim, self.geometry.rope_theta)
        return apply_rotary(key_states, angles), value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Kept tokens before the new ones."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    @property
    def memory(self) -> int:
        """Bytes of the kept keys and values."""
        held = [x for x in (*self.keys, *self.values) if x is not None]
        return sum(x.numel() * x.element_size() for x in held)
