"""What can be done to the layers of a transformers model: keep the first ones, freeze, recompute, compile."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig


class Recomputed(nn.Module):
    """Mixed into a layer's class: its activations are computed again in the backward pass (Chen et al. 2016).

    Unlike transformers' own switch, it keeps the layer's keys and values, which later tokens attend to.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.training and torch.is_grad_enabled():
            return checkpoint(super().forward, *args, use_reentrant=False, **kwargs)
        return super().forward(*args, **kwargs)


def recompute(layers: nn.ModuleList) -> None:
    """Make each of `layers` a `Recomputed` one, in place."""
    for layer in layers:
        if not isinstance(layer, Recomputed):
            layer.__class__ = type(layer.__class__.__name__, (Recomputed, layer.__class__), {})


def keep_first(layers: nn.ModuleList, config: PreTrainedConfig, count: int) -> None:
    """Remove all but the first `count` of a text model's `layers`, and say so in its configuration."""
    if not 1 <= count <= len(layers):
        raise ValueError(f"num_layers must be from 1 to {len(layers)}, found {count}")
    del layers[count:]
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]


def freeze_parts(
    model: nn.Module,
    blocks: nn.ModuleList,
    part_of: Callable[[str], str],
    parts: Collection[str],
    train_last: int | None,
) -> None:
    """Stop the gradients of parameters of these parts, and of all blocks but the last `train_last` (None:
    of none)."""
    for name, parameter in model.named_parameters():
        if part_of(name) in parts:
            parameter.requires_grad_(False)
    if train_last is not None:
        if not 0 <= train_last <= len(blocks):
            raise ValueError(f"train_last_layers must be from 0 to {len(blocks)}, found {train_last}")
        for block in list(blocks)[: len(blocks) - train_last]:
            block.requires_grad_(False)
