"""A cache that takes every layer's keys and values from a transformers model while it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class FullCache(Exception):
    """The last layer's keys and values are there, and nothing else is wanted: ends a model's forward pass."""


class PrefixCache(Cache):
    """Collects the keys and values (after the rotary embedding) of one pass over a prefix.

    A layer that runs again, as under activation checkpointing, replaces nothing: the tensors of the first
    run are the ones that later tokens attend to, and their gradients flow through it. With `stop` the pass
    ends with `FullCache` as soon as the last layer has given its own.
    """

    def __init__(self, num_layers: int, *, stop: bool = False) -> None:
        super().__init__(layers=[DynamicLayer() for _ in range(num_layers)])
        self.stop = stop
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.keys[layer_idx] is None:
            self.keys[layer_idx], self.values[layer_idx] = key_states, value_states
        if self.stop and layer_idx == len(self.keys) - 1:
            raise FullCache
        return key_states, value_states

    def taken(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Keys and values of all layers, each (b, h, l, e)."""
        keys = tuple(key for key in self.keys if key is not None)
        values = tuple(value for value in self.values if value is not None)
        if len(keys) != len(self.keys):
            raise RuntimeError(f"{len(self.keys) - len(keys)} layers of the backbone gave no keys")
        return keys, values


class ExtendedCache(PrefixCache):
    """Collects the keys and values of tokens that follow a prefix, behind the prefix's own.

    The prefix is never changed, so that a layer that runs again sees what it saw at first.
    """

    def __init__(self, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
        super().__init__(len(keys))
        self.before = tuple(zip(keys, values, strict=True))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.before[layer_idx]
        together = torch.cat((keys, key_states), dim=2), torch.cat((values, value_states), dim=2)
        return super().update(*together, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.before[layer_idx][0].shape[2]


def continued(keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> Cache:
    """A growing cache that starts from a prefix's keys and values, for tokens that follow it."""
    cache = Cache(layers=[DynamicLayer() for _ in keys])
    for index, (key, value) in enumerate(zip(keys, values, strict=True)):
        cache.update(key, value, index)
    return cache
