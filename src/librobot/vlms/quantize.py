"""Linear layers in four bits: NF4 with double quantisation (QLoRA, Dettmers et al. 2023, arXiv 2305.14314,
section 3), by bitsandbytes.

Their state dict holds tensors of fixed shapes only, so that a checkpoint loads with `weights_only=True` and
its shapes do not depend on the weights.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from librobot.errors import LibrobotError, require

SETTINGS = "weight.quant_state.bitsandbytes__nf4"  # a text in JSON, as bytes
SETTINGS_BYTES = 512


def quantize_linear(
    model: nn.Module, names: Collection[str], *, double_quant: bool, compute_dtype: torch.dtype | None
) -> None:
    """Replace the linear layers of these `names` in `model` by four-bit ones, which do not train.

    `compute_dtype` is that of their matrix products; None is that of the weights. Raises LibrobotError where
    bitsandbytes is missing or a layer has no weights yet (the meta device).
    """
    for name in names:
        replace_module(model, name, quantized(model.get_submodule(name), name, double_quant, compute_dtype))


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def is_quantized(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and getattr(module.weight, "quant_state", None) is not None


def quantized(
    linear: nn.Module, name: str, double_quant: bool, compute_dtype: torch.dtype | None
) -> nn.Module:
    """A four-bit layer with the weights of `linear`."""
    bitsandbytes = require("bitsandbytes", "bnb")
    assert isinstance(linear, nn.Linear)
    weight, bias = linear.weight, linear.bias
    if weight.is_meta:
        raise LibrobotError(
            f"adapter=qlora: {name} has no weights (meta device); only real ones have four bits"
        )
    dtype = compute_dtype or weight.dtype
    made = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=bias is not None,
        compute_dtype=dtype,
        compress_statistics=double_quant,
        quant_type="nf4",
        device="meta",
    )
    made.weight = bitsandbytes.nn.Params4bit(
        weight.data, requires_grad=False, compress_statistics=double_quant, quant_type="nf4", module=made
    )
    if bias is not None:
        made.bias = nn.Parameter(bias.data.to(dtype), requires_grad=False)
    # On some CPUs bitsandbytes packs the weights anew when it evaluates, and no gradient passes after.
    made.support_avx512bf16_for_cpu = False
    made.register_state_dict_post_hook(_plain_state)
    made.register_load_state_dict_pre_hook(_load_state)
    made.train(linear.training)
    return made.to(weight.device)  # here the weights become four-bit


def dequantized(layer: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """An ordinary linear layer with the weights that the four-bit `layer` computes with."""
    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    made.weight = nn.Parameter(full_weight(layer).to(dtype), requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
    made.train(layer.training)
    return made


def full_weight(layer: nn.Linear) -> Tensor:
    functional = require("bitsandbytes", "bnb").functional
    weight: Any = layer.weight
    return functional.dequantize_4bit(weight.data, weight.quant_state)


def _plain_state(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Tensors instead of bitsandbytes' parameters; the settings, whose length varies, padded with spaces."""
    state[f"{prefix}weight"] = state[f"{prefix}weight"].detach().as_subclass(Tensor)
    settings = state[f"{prefix}{SETTINGS}"]
    assert len(settings) <= SETTINGS_BYTES
    padding = settings.new_full((SETTINGS_BYTES - len(settings),), ord(" "))
    state[f"{prefix}{SETTINGS}"] = torch.cat((settings, padding))


def _load_state(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Build the weight from its parts; they leave `state`, which torch would hold to be unexpected."""
    start = f"{prefix}weight."
    parts = {name.removeprefix(start): state.pop(name) for name in list(state) if name.startswith(start)}
    weight = state.get(f"{prefix}weight")
    if weight is None or not parts:
        return  # torch reports what is missing
    device = module.weight.device
    module.weight = type(module.weight).from_prequantized(
        weight, parts, requires_grad=False, device=device, module=module
    )
