"""The tiny backbone's own options."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import tiny_models
from librobot.errors import LibrobotError
from librobot.nn.vision import PatchTower
from librobot.vlms.tiny import TinyVLM


def build(**changes) -> TinyVLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_heads": 2, "num_kv_heads": 1, "mlp_width": 48, "image_size": 32}
    return TinyVLM(**sizes | changes).eval()


def observe(vlm: TinyVLM, prompts: list[str], **changes):
    observation = replace(tiny_models.batch(len(prompts)).observation, prompt=prompts, **changes)
    return replace(observation, inputs=vlm.processor(prompts))


@torch.inference_mode()
@pytest.mark.parametrize(("attention", "moves"), [("causal", False), ("bidirectional", True)])
def test_earlier_tokens_see_later_ones_only_when_told(attention, moves):
    """Two prompts differ in their last byte alone; a tower without language keeps the pictures the same."""
    vlm = build(prefix_attention=attention, tower=PatchTower)
    first, second = (vlm(observe(vlm, [prompt])).hidden[0, :-1] for prompt in ("cube A", "cube B"))
    assert torch.allclose(first, second, atol=1e-6) != moves


@torch.inference_mode()
def test_pictures_are_resized_inside():
    vlm = build()
    observation = observe(vlm, ["open"])
    small = {
        name: functional.interpolate(image[:, 0].float(), (32, 32), mode="bilinear", antialias=True)[:, None]
        / 255
        for name, image in observation.images.items()
    }
    torch.testing.assert_close(vlm(observation).hidden, vlm(replace(observation, images=small)).hidden)


@torch.inference_mode()
def test_without_cameras_the_prompt_remains():
    vlm = build()
    context = vlm(observe(vlm, ["open"], images={}, image_mask={}))
    assert context.mask.shape == (1, 5)


@torch.inference_mode()
def test_logits_over_bytes():
    vlm = build()
    logits = vlm.logits(vlm(observe(vlm, ["open"])).hidden)
    assert logits.shape[-1] == vlm.text.table.num_embeddings


@torch.inference_mode()
def test_bytes_share_tokens():
    """BOS and ten bytes make three tokens of four; longer padding adds none, and every byte counts."""
    vlm = build(bytes_per_token=4)
    context = vlm(observe(vlm, ["open cubes", "open"], images={}, image_mask={}))
    assert context.mask.tolist() == [[True, True, True], [True, True, False]]
    alone = vlm(observe(vlm, ["open"], images={}, image_mask={}))
    torch.testing.assert_close(context.hidden[1, :2], alone.hidden[0])
    other = vlm(observe(vlm, ["open cubed"], images={}, image_mask={}))
    assert not torch.allclose(other.hidden[0, 2], context.hidden[0, 2])


def test_what_is_impossible_is_refused():
    vlm = build(max_cameras=1)
    with pytest.raises(LibrobotError, match="max_cameras"):
        vlm(observe(vlm, ["open"]))
    with pytest.raises(LibrobotError, match="processor"):
        vlm(tiny_models.batch(1).observation)
    with pytest.raises(ValueError, match="hidden states 0 to 2"):
        build().unused_parameters((3,))
    with pytest.raises(ValueError, match="prefix_attention"):
        build(prefix_attention="sideways")
    with pytest.raises(ValueError, match="bytes_per_token"):
        build(bytes_per_token=0)
    with pytest.raises(ValueError, match="num_heads"):
        build(num_heads=3)
