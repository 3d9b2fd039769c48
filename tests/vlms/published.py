"""Small models of the published families, and observations with pictures of any sizes, for their tests."""

from __future__ import annotations

from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import tiny_models
from librobot.types import Observation

PROMPTS = ["reach the red cube", "open", "pick up the cup"]


def build(option: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    node = OmegaConf.create(tiny_models.node("vlm", option, **changes))
    return instantiate(node, _convert_="all").eval()


def build_published(option: str) -> Any:
    """The published size without weights, on the meta device."""
    node = OmegaConf.to_container(tiny_models.load("vlm", option)) | {"pretrained": False}
    with torch.device("meta"):
        return instantiate(OmegaConf.create(node), _convert_="all")


def observe(vlm: Any, sides=((28, 40), (32, 32)), prompts=PROMPTS) -> Observation:
    """A camera for each of `sides` (height, width), and a sample for each prompt."""
    draw = torch.Generator().manual_seed(1)
    b = len(prompts)
    images = {
        f"camera{i}": torch.randint(0, 256, (b, 1, 3, *side), generator=draw, dtype=torch.uint8)
        for i, side in enumerate(sides)
    }
    return Observation(
        images=images,
        image_mask={name: torch.ones(b, dtype=torch.bool) for name in images},
        state=torch.zeros(b, 1, 1),
        prompt=list(prompts),
        inputs=vlm.processor(list(prompts), images),
    )


def pictures_by_sample(observation: Observation) -> list[list[torch.Tensor]]:
    rows = range(observation.batch_size)
    return [[image[row, 0] for image in observation.images.values()] for row in rows]


def assert_unused_parameters_are_exact(vlm: Any, layers: tuple[int, ...]) -> None:
    """Every parameter that is not named as unused gets a gradient, and no other one."""
    context = vlm(observe(vlm), layers=layers)
    outputs = context.layers + context.keys + context.values
    sum(x[..., 0].square().sum() for x in outputs).backward()
    unused = {id(parameter) for parameter in vlm.unused_parameters(layers)}
    for name, parameter in vlm.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in unused), name


@torch.inference_mode()
def assert_folder_round_trips(vlm: Any, option: str, folder: Any, **changes: Any) -> None:
    """What `save_pretrained` writes is a checkpoint with the same outputs."""
    for part in (vlm.model, vlm.tokenizer, vlm.picture_processor):
        part.save_pretrained(folder)
    again = build(option, pretrained=True, checkpoint=str(folder), config=None, **changes)
    assert torch.equal(again(observe(again)).hidden, vlm(observe(vlm)).hidden)


@torch.inference_mode()
def first_seen_difference(vlm: Any) -> int:
    """Of instructions that differ in their last letter: the first token, from the end, that differs (-1 is
    the last one)."""
    one, other = (vlm(observe(vlm, prompts=[text])).hidden for text in ("reach A", "reach B"))
    changed = torch.nonzero((one - other).abs().amax(dim=(0, 2)) > 1e-6)
    return int(changed[0]) - one.shape[1]
