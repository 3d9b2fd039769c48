"""Every variant at its published size, on the meta device: no weights, no download."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from omegaconf import OmegaConf

import tiny_models
from librobot.config.build import build

# Parameters of the published checkpoint, each tensor once: the hub's count of its safetensors files, rounded
# where only a rounded figure or the files' size was to be had (docs/backbones.md).
PUBLISHED = {
    "cosmos_reason2": 1_523_500_032,  # its part of GR00T N1.7, whose file holds the tied embedding twice
    "eagle25": 1_655_357_376,  # its part of GR00T N1.5
    "eagle_block2a": 1_557_344_192,  # its part of GR00T N1.6, whose file holds the tied embedding twice
    "florence2": 231_567_705,
    "florence2_large": 776_721_497,
    "internvl2": 2_206_000_000,
    "internvl2_8b": 8_080_000_000,
    "internvl3": 2_090_000_000,
    "internvl3_8b": 7_940_000_000,
    "llava": 7_063_427_072,
    "llava_13b": 13_350_000_000,
    "paligemma": 2_923_466_480,
    "paligemma2": 3_032_242_416,
    "prismatic": 7_541_237_184,  # OpenVLA's; ours lacks the vision layers that nothing reads
    "qwen2vl": 2_208_985_600,
    "qwen2vl_7b": 8_291_375_616,
    "qwen25vl": 3_754_622_976,
    "qwen25vl_7b": 8_292_166_656,
    "qwen3vl": 2_127_532_032,
    "qwen3vl_4b": 4_437_815_808,
    "qwen3vl_8b": 8_767_123_696,
    "smolvla": 350_165_184,  # its part of smolvla_base: 16 layers of SmolVLM2
    "smolvlm2": 507_482_304,
    "smolvlm2_256m": 256_484_928,
    "smolvlm2_2b": 2_246_784_880,
}
VARIANTS = sorted(path.stem for path in (tiny_models.CONF / "vlm").glob("*.yaml") if "tiny" not in path.stem)


@cache
def on_meta(name: str):
    node = OmegaConf.merge(tiny_models.load("vlm", name), {"pretrained": False})
    with torch.device("meta"):
        return build(node, "vlm")


def test_every_variant_is_listed():
    assert sorted(PUBLISHED) == VARIANTS


@pytest.mark.parametrize("name", VARIANTS)
def test_the_number_of_parameters_is_the_published_one(name):
    vlm = on_meta(name)
    assert all(parameter.is_meta for parameter in vlm.parameters())
    count = sum(parameter.numel() for parameter in vlm.parameters())
    assert count == pytest.approx(PUBLISHED[name], rel=0.01), f"{count:,}"


@pytest.mark.parametrize("name", VARIANTS)
def test_blocks_and_adapter_targets_are_found(name):
    vlm = on_meta(name)
    inside = {id(p) for block in vlm.blocks for p in block.parameters()}
    repeated = [p for n, p in vlm.text.named_parameters() if "layers." in n and "decoder" not in n]
    assert repeated
    assert all(id(p) in inside for p in repeated)
    for target in vlm.adapter_targets:
        found = [m for m in vlm.blocks.modules() if isinstance(getattr(m, target, None), torch.nn.Linear)]
        assert len(found) == len(vlm.blocks), target
