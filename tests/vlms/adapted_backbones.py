"""Backbones with adapters, as training leaves them."""

from dataclasses import replace

import torch
from peft.tuners.lora import LoraLayer

import tiny_models
from librobot.config.build import build
from librobot.vlms.adapters import lora

TARGETS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


FAMILIES = [name for name in tiny_models.options("vlm") if name.endswith("_tiny")]


def backbone(name: str = "qwen2vl_tiny", *, seed: int = 0, **changes):
    torch.manual_seed(seed)
    return build(tiny_models.node("vlm", name, **changes), "vlm").eval()


def read(vlm, layers=(-1,)):
    observation = tiny_models.batch().observation
    inputs = vlm.processor(observation.prompt, observation.images)
    return vlm(replace(observation, inputs=inputs), layers=layers)


@torch.no_grad()
def outputs(vlm):
    context = read(vlm)
    return torch.cat([context.hidden[context.mask].flatten(), *(v.flatten() for v in context.values)])


def train_a_little(vlm, seed: int = 1):
    """Adapters as training leaves them: B no longer zero, DoRA's magnitudes no longer the rows' lengths."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05, generator=draw)
            elif ".lora_magnitude_vector." in name:
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=draw))
    return vlm


def adapted(name: str = "qwen2vl_tiny", **options):
    vlm = backbone(name)
    lora(vlm=vlm, **options)
    return train_a_little(vlm.eval())


def layers_with_adapters(vlm):
    return {name for name, module in vlm.model.named_modules() if isinstance(module, LoraLayer)}


def trainable(vlm):
    return {name for name, parameter in vlm.named_parameters() if parameter.requires_grad}
