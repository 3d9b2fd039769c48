"""pi0 and pi0.5 at their published size, on the meta device."""

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

import tiny_models
from librobot.config.build import build_framework
from librobot.types import Dim

EXPERT = 311e6  # openpi's gemma_300m
TOTAL = {"pi0": 3.24e9, "pi05": 3.35e9}


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_the_number_of_parameters_is_the_published_one(name):
    plain = {
        "framework": OmegaConf.to_container(tiny_models.load("framework", name)),
        "head": OmegaConf.to_container(tiny_models.load("head", "flow_matching")),
        "vlm": OmegaConf.to_container(tiny_models.load("vlm", "paligemma")) | {"pretrained": False},
        "optim": tiny_models.config("pi0")["optim"],
        "scheduler": tiny_models.config("pi0")["scheduler"],
    }
    plain["framework"].pop("defaults", None)
    spec = replace(tiny_models.SPEC, action=tuple(Dim(f"a{i}") for i in range(14)))
    with torch.device("meta"):
        framework = build_framework(OmegaConf.create(plain), spec)
    total = sum(p.numel() for p in framework.parameters())
    expert = sum(p.numel() for p in framework.expert.parameters())
    trainable = sum(p.numel() for p in framework.parameters() if p.requires_grad)
    print(f"{name}: {total:,} in all, {trainable:,} trainable, expert {expert:,}")
    if name == "pi0":
        assert expert == pytest.approx(EXPERT, rel=0.01)
    assert total == pytest.approx(TOTAL[name], rel=0.01)
    assert framework.width == 1024
    assert len(framework.expert.layers) == 18
