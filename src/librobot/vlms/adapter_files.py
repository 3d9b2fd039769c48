"""Adapters and merged backbones as files.

save_adapter, load_adapter    peft's adapter_config.json and adapter_model.safetensors
save_merged                   a folder for `vlm.checkpoint=`
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from peft import LoraConfig, PeftConfig, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from librobot.errors import LibrobotError, nearest
from librobot.vlms.adapters import (
    CHANGE_BASE,
    NAME,
    adapted,
    adapter_of,
    adapter_weights,
    fingerprint,
    inject,
    merge_adapter,
    merged_into,
    refuse_twice,
    supported,
)
from librobot.vlms.base import VLM
from librobot.vlms.pretrained import PretrainedVLM

PREFIX = "base_model.model."  # of the names in peft's files
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(vlm: VLM, folder: str | Path) -> None:
    """Write the adapter, and the parts that train in full, as peft's files; peft itself can read them.

    Raises LibrobotError where there is no adapter, or the folder exists and is not empty.
    """
    backbone = supported(vlm)
    config = adapted(backbone, "save_adapter")
    if config.init_lora_weights in CHANGE_BASE:
        raise LibrobotError(
            f"save_adapter: init={config.init_lora_weights} has changed the backbone's weights too, so the "
            f"adapter alone is not enough; write everything with save_merged"
        )
    tensors = {PREFIX + name: value.contiguous().cpu() for name, value in adapter_weights(backbone).items()}

    def write(partial: Path) -> None:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(partial))

    _write_folder(Path(folder), write)


def load_adapter(vlm: VLM, folder: str | Path) -> None:
    """Put the adapter of `folder` on a backbone that has none; it can go on training.

    Raises LibrobotError where the files are missing or do not fit this backbone, or where this adapter is
    already part of its weights.
    """
    backbone, folder = supported(vlm), Path(folder)
    place = f"load_adapter: {folder}"
    if adapter_of(backbone) is not None:
        raise LibrobotError(
            f"{place}: the backbone already has an adapter; build it with adapter=none, or merge"
        )
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise LibrobotError(f"{place}: expected {CONFIG} and {WEIGHTS}, found no {missing[0]}")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        tensors = {name.removeprefix(PREFIX): value for name, value in load_file(folder / WEIGHTS).items()}
    except (TypeError, ValueError, KeyError, OSError, SafetensorError) as error:
        raise LibrobotError(f"{place}: not an adapter that can be read ({error})") from error
    if not isinstance(config, LoraConfig):
        raise LibrobotError(f"{place}: expected a LoRA adapter, found {type(config).__name__}")
    refuse_twice(backbone, fingerprint(tensors), place)
    _fit(backbone, tensors, place)
    config.init_lora_weights, config.inference_mode = True, False
    trained, config.modules_to_save = config.modules_to_save or [], None
    config.target_modules = sorted({name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name})
    inject(backbone, config, trained)
    _compare(adapter_weights(backbone), tensors, place)
    set_peft_model_state_dict(backbone.model, tensors, adapter_name=NAME)


def save_merged(vlm: VLM, folder: str | Path) -> None:
    """Merge the adapter, if that has not been done, and write the backbone as `vlm.checkpoint=` reads it.

    Raises LibrobotError where there never was an adapter, or the folder exists and is not empty.
    """
    backbone, folder = supported(vlm), Path(folder)
    _check_free(folder)
    if adapter_of(backbone) is not None or not merged_into(backbone):
        merge_adapter(vlm)

    def write(partial: Path) -> None:
        backbone.model.save_pretrained(partial)
        backbone.tokenizer.save_pretrained(partial)
        backbone.picture_processor.save_pretrained(partial)

    _write_folder(folder, write)


def _fit(vlm: PretrainedVLM, tensors: Mapping[str, Tensor], place: str) -> None:
    """Raise LibrobotError where a tensor's layer is missing in `vlm` or has another size."""
    modules = dict(vlm.model.named_modules())
    for name, tensor in tensors.items():
        layer = name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]
        if layer not in modules:
            raise LibrobotError(f"{place}: the backbone has no layer {layer!r}; {_near(layer, modules)}")
        module = modules[layer]
        if ".lora_" in name and not isinstance(module, nn.Linear):
            raise LibrobotError(f"{place}: {layer} is no linear layer, but {type(module).__name__}")
        if isinstance(module, nn.Linear) and ".lora_A." in name and tensor.shape[-1] != module.in_features:
            raise LibrobotError(
                f"{place}: {layer} takes {module.in_features} features, the adapter is for "
                f"{tensor.shape[-1]}; it was trained on another backbone"
            )


def _near(layer: str, modules: Mapping[str, nn.Module]) -> str:
    """The nearest of the layers with the same last name."""
    last = layer.rpartition(".")[2]
    return nearest(layer, [n for n in modules if n.rpartition(".")[2] == last][:6] or list(modules)[1:6])


def _compare(own: Mapping[str, Tensor], found: Mapping[str, Tensor], place: str) -> None:
    for name in sorted(own.keys() | found.keys()):
        sizes = [tuple(held[name].shape) if name in held else None for held in (own, found)]
        if sizes[0] != sizes[1]:
            raise LibrobotError(
                f"{place}: {name} does not fit its {CONFIG}: expected {sizes[0] or 'nothing'}, found "
                f"{sizes[1] or 'nothing'}"
            )


def _check_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LibrobotError(f"{folder} exists and is not empty; name another folder, or remove it")


def _write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside the target, then rename it."""
    _check_free(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    partial.mkdir(parents=True)
    try:
        write(partial)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
