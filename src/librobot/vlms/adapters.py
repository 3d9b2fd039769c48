"""Low-rank adapters on a published backbone: LoRA (Hu et al. 2021, arXiv 2106.09685), rsLoRA (2312.03732),
DoRA (2402.09353) and QLoRA (2305.14314), by peft. `adapter_files` saves and loads them.

Modules keep their names; an adapted layer's weight becomes `<layer>.base_layer.weight`. What was merged is
written into the model's configuration, and so goes into every checkpoint and folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from librobot.errors import LibrobotError, nearest
from librobot.nn.pretrained import stored_files
from librobot.vlms.base import VLM
from librobot.vlms.pretrained import PretrainedVLM
from librobot.vlms.quantize import dequantized, full_weight, is_quantized, quantize_linear, replace_module

Init = Literal["default", "gaussian", "orthogonal", "pissa", "olora"]
DType = Literal["float32", "bfloat16", "float16"]
CHANGE_BASE = ("pissa", "olora")
NAME = "default"  # of the one adapter
RECORD = "librobot_adapter"  # in the model's configuration: {"active": bool, "merged": [fingerprint, ...]}


def lora(
    *,
    vlm: VLM,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    parts: Sequence[str] = ("language",),
    train: Sequence[str] = (),
    rslora: bool = False,
    dora: bool = False,
    init: Init = "default",
) -> None:
    """Put an adapter on `vlm`, in place: W x becomes W x + s B A x with s = alpha / rank, W frozen.

    `targets` are the last components of linear layers' names; None takes the family's in the language model
    and every linear layer in other parts. `parts` are searched for them. Parts in `train` keep training in
    full, all other weights of the backbone are frozen. `rslora` makes s = alpha / sqrt(rank); `dora` learns
    the length of each row of the weight apart from its direction. `init` "pissa" and "olora" start from the
    weights' own factors and subtract them from W. Raises LibrobotError where a target is not found.
    """
    backbone = supported(vlm)
    if merged_in_checkpoint():
        return
    if dora and init in CHANGE_BASE:
        raise ValueError(f"init={init} and dora=true exclude each other")
    for name, value in (("rank", rank), ("alpha", alpha)):
        if value <= 0:
            raise ValueError(f"{name} must be positive, found {value}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, found {dropout}")
    _check_parts(backbone, parts, train)
    initial: Any = {"default": True, "gaussian": "gaussian"}.get(init, init)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides it, nothing else
        lora_dropout=dropout,
        target_modules=_targets(backbone, targets, parts),
        use_rslora=rslora,
        use_dora=dora,
        init_lora_weights=True if stored_files() else initial,  # weights follow
        base_model_name_or_path=backbone.checkpoint,
    )
    inject(backbone, config, modules_in(backbone, train))
    config.init_lora_weights = initial


def qlora(
    *,
    vlm: VLM,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    parts: Sequence[str] = ("language",),
    train: Sequence[str] = (),
    rslora: bool = False,
    dora: bool = False,
    init: Init = "default",
    double_quant: bool = True,
    compute_dtype: DType | None = None,
) -> None:
    """`lora` on a language model whose linear layers (not embeddings, not the output layer) have four bits.

    `double_quant` stores the blocks' scales in eight bits. `compute_dtype` is that of the matrix products;
    None is that of the weights.
    """
    backbone = supported(vlm)
    if merged_in_checkpoint():
        return
    if init in CHANGE_BASE:
        raise ValueError(f"init={init} changes the weights, which four bits would round again; take default")
    _check_parts(backbone, parts, train)
    quantize(vlm, double_quant=double_quant, compute_dtype=compute_dtype)
    lora(
        vlm=vlm,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=targets,
        parts=parts,
        train=train,
        rslora=rslora,
        dora=dora,
        init=init,
    )


def quantize(vlm: VLM, *, double_quant: bool = True, compute_dtype: DType | None = None) -> None:
    """Give the language model's linear layers four bits (see `qlora`)."""
    backbone = supported(vlm)
    names = [name for name in linear_layers(backbone) if part(backbone, name) == "language"]
    dtype = None if compute_dtype is None else getattr(torch, compute_dtype)
    quantize_linear(backbone.model, names, double_quant=double_quant, compute_dtype=dtype)


@torch.no_grad()
def merge_adapter(vlm: VLM) -> None:
    """Fold the adapter into the weights, in place; a four-bit layer becomes an ordinary one.

    The weights stay frozen. Raises LibrobotError where there is no adapter, where one is already merged, or
    where this very adapter is already part of the weights: added twice, it would spoil them.
    """
    backbone = supported(vlm)
    adapted(backbone, "merge_adapter")
    mark = fingerprint(adapter_weights(backbone))
    refuse_twice(backbone, mark, "merge_adapter")
    model: Any = backbone.model
    dtype = model.get_input_embeddings().weight.dtype
    layers: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in layers:
        base = layer.get_base_layer()
        assert isinstance(base, nn.Linear)
        if is_quantized(base):
            weight = full_weight(base)
            if NAME in layer.lora_variant:
                weight = layer.lora_variant[NAME].merge_safe(layer, NAME, weight)
            else:
                weight = weight + layer.get_delta_weight(NAME).to(weight)
            base = dequantized(base, dtype)
            base.weight.copy_(weight)
        else:
            layer.merge(adapter_names=[NAME])
        replace_module(model, name, base)
    for name, layer in list(model.named_modules()):
        if is_quantized(layer):
            assert isinstance(layer, nn.Linear)
            replace_module(model, name, dequantized(layer, dtype))
    del model.peft_config
    record(backbone, active=False, merged=[*merged_into(backbone), mark])


def adapter_weights(vlm: VLM) -> dict[str, Tensor]:
    """Name -> tensor of the adapter and of the parts that train in full, by peft's names without a prefix."""
    backbone = supported(vlm)
    config = adapted(backbone, "adapter_weights")
    state = get_peft_model_state_dict(backbone.model, adapter_name=NAME, save_embedding_layers=False)
    for module in config.modules_to_save or []:
        own = backbone.model.get_submodule(module).named_parameters(recurse=False)
        state |= {f"{module}.{name}": parameter.detach() for name, parameter in own}
    return state


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """The same for the same numbers, whatever their device."""
    made = hashlib.sha256()
    for name in sorted(tensors):
        if ".lora_" in name:
            made.update(name.encode())
            made.update(tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return made.hexdigest()


def supported(vlm: VLM) -> PretrainedVLM:
    """`vlm`, if it is a backbone that can have an adapter."""
    if not isinstance(vlm, PretrainedVLM):
        raise LibrobotError(
            f"adapter: {type(vlm).__name__} has no targets for adapters; choose a published family (vlm=), "
            f"or adapter=none"
        )
    return vlm


def adapter_of(vlm: PretrainedVLM) -> LoraConfig | None:
    """The configuration of the adapter that is on `vlm` now."""
    return getattr(vlm.model, "peft_config", {}).get(NAME)


def adapted(vlm: PretrainedVLM, place: str) -> LoraConfig:
    """The configuration of the adapter. Raises LibrobotError where there is none."""
    config = adapter_of(vlm)
    if config is None:
        why = (
            "its adapter is already merged" if merged_into(vlm) else "it was built without one (adapter=lora)"
        )
        raise LibrobotError(f"{place}: the backbone has no adapter; {why}")
    return config


def merged_into(vlm: PretrainedVLM) -> list[str]:
    """Fingerprints of the adapters that are part of the weights."""
    return list((getattr(vlm.model.config, RECORD, None) or {}).get("merged", []))


def record(vlm: PretrainedVLM, *, active: bool, merged: list[str]) -> None:
    setattr(vlm.model.config, RECORD, {"active": active, "merged": merged})


def refuse_twice(vlm: PretrainedVLM, mark: str, place: str) -> None:
    if mark in merged_into(vlm):
        raise LibrobotError(
            f"{place}: this adapter is already part of the weights of {vlm.checkpoint or 'the backbone'}; "
            f"use them without it"
        )


def merged_in_checkpoint() -> bool:
    """Whether the checkpoint that is being read was written after its adapter had been merged."""
    config = json.loads(stored_files().get("config.json", "{}"))
    return config.get(RECORD, {}).get("active") is False


def inject(vlm: PretrainedVLM, config: LoraConfig, trained: Sequence[str]) -> None:
    """Put the adapter on, and freeze all but it and the modules called `trained`."""
    model: Any = vlm.model
    model.is_loaded_in_4bit = any(is_quantized(module) for module in model.modules())  # read by peft
    inject_adapter_in_model(config, model, NAME)
    del model.is_loaded_in_4bit
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        parameter.requires_grad_(".lora_" in name or owner in trained)
    config.modules_to_save = list(trained) or None  # after injection: peft would wrap, and so rename, them
    record(vlm, active=True, merged=merged_into(vlm))


def linear_layers(vlm: PretrainedVLM) -> list[str]:
    """Names of the linear layers that a `Context` depends on."""
    unused = {id(module) for root in vlm.never_used() for module in root.modules()}
    unused.add(id(vlm.model.get_output_embeddings()))
    return [
        name
        for name, module in vlm.model.named_modules()
        if isinstance(module, nn.Linear)
        and not isinstance(
            module, NonDynamicallyQuantizableLinear
        )  # read by nn.MultiheadAttention, not called
        and id(module) not in unused
    ]


def part(vlm: PretrainedVLM, module: str) -> str:
    return vlm.part_of(f"{module}.weight")


def modules_in(vlm: PretrainedVLM, parts: Collection[str]) -> list[str]:
    """Names of the modules of `parts` that hold parameters themselves."""
    owners = [
        name.rpartition(".")[0] for name, _ in vlm.model.named_parameters() if vlm.part_of(name) in parts
    ]
    return list(dict.fromkeys(owners))


def _check_parts(vlm: PretrainedVLM, parts: Sequence[str], train: Sequence[str]) -> None:
    if adapter_of(vlm) is not None:
        raise LibrobotError("adapter: the backbone already has one; merge it first (merge_adapter)")
    for key, names in (("parts", parts), ("train", train)):
        for name in names:
            if name not in vlm.parts:
                raise ValueError(f"{key}: no part {name!r}; {nearest(name, vlm.parts)}")
    if not parts:
        raise ValueError(f"parts must name at least one of {', '.join(vlm.parts)}; or take adapter=none")
    for name in train:
        if name in parts:
            raise ValueError(f"{name!r} is in parts and in train: it has an adapter, or it trains in full")
        own = [p for n, p in vlm.model.named_parameters() if vlm.part_of(n) == name]
        if not any(parameter.requires_grad for parameter in own):
            raise ValueError(f"train: part {name!r} is frozen by vlm.freeze; take it out there")


def _targets(vlm: PretrainedVLM, targets: Sequence[str] | None, parts: Sequence[str]) -> list[str]:
    """Full names of the layers to adapt."""
    found, seen = [], []
    for name in parts:
        inside = [layer for layer in linear_layers(vlm) if part(vlm, layer) == name]
        wanted = vlm.adapter_targets if targets is None and name == "language" else targets
        hits = inside if wanted is None else [n for n in inside if any(_fits(n, target) for target in wanted)]
        if not hits and (targets is None or not inside):
            raise LibrobotError(
                f"adapter.parts: the part {name!r} of {type(vlm).__name__} has no linear layers"
            )
        found += hits
        seen += inside
    for target in targets or ():
        if not any(_fits(layer, target) for layer in found):
            names = {layer.rpartition(".")[2] for layer in seen}
            raise LibrobotError(
                f"adapter.targets: no linear layer {target!r} in {', '.join(parts)} of {type(vlm).__name__}; "
                f"{nearest(target, names)}"
            )
    return found


def _fits(layer: str, target: str) -> bool:
    return f".{layer}".endswith(f".{target}")
