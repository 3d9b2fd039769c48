"""Every family that packs: hidden states and gradients of packed rows are those of prefix and extension."""

from dataclasses import replace

import pytest
import torch
from adapted_backbones import adapted
from omegaconf import OmegaConf

import tiny_models
from librobot.config.build import build
from librobot.errors import LibrobotError

FAMILIES = ["tiny", *(n for n in tiny_models.options("vlm") if n.endswith("_tiny") and n != "florence2_tiny")]


def make(name, **changes):
    torch.manual_seed(0)
    return build(OmegaConf.create(tiny_models.node("vlm", name, **changes)), "vlm").train()


def observed(vlm):
    """Prompts of four lengths; the second sample lacks a camera, the third both."""
    observation = tiny_models.batch().observation
    masks = {name: mask.clone() for name, mask in observation.image_mask.items()}
    masks["wrist"][1] = masks["wrist"][2] = masks["front"][2] = False
    inputs = vlm.processor(observation.prompt, observation.images)
    return replace(observation, image_mask=masks, inputs=inputs)


def answers(vlm):
    """Embeddings of five tokens, of which two, five, one and none are real."""
    torch.manual_seed(1)
    ids = torch.randint(0, 250, (4, 5))
    return vlm.embed_tokens(ids), torch.arange(5) < torch.tensor([2, 5, 1, 0])[:, None]


def last(context):
    place = context.mask.shape[1] - 1 - context.mask.flip(1).int().argmax(dim=1)
    return context.hidden[torch.arange(len(place)), place][:, None]


def both_ways(vlm, length=None):
    """Hidden states of the last prefix tokens and of real answers, and the gradients of a random sum."""
    results = []
    for packed in (False, True):
        observation, (x, real) = observed(vlm), answers(vlm)
        if packed:
            hidden = vlm.read_packed(observation, x, real, length=length)
        else:
            prefix = vlm(observation)
            hidden = torch.cat((last(prefix), vlm.extend(prefix, x).hidden), dim=1)
        wanted = hidden[torch.cat((torch.ones(4, 1, dtype=torch.bool), real), dim=1)]
        vlm.zero_grad()
        (wanted * torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
        gradients = {n: p.grad.clone() for n, p in vlm.named_parameters() if p.grad is not None}
        results.append((wanted.detach(), gradients))
    return results


def assert_same(padded, packed):
    (hidden, gradients), (own_hidden, own) = padded, packed
    assert (hidden - own_hidden).abs().max() <= 1e-5
    for name in gradients.keys() | own.keys():
        theirs, ours = (found.get(name, torch.zeros(())) for found in (gradients, own))
        assert (theirs - ours).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max())), name


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_rows_give_the_same_states_and_gradients(name):
    assert_same(*both_ways(make(name)))


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("name", ["tiny", "qwen2vl_tiny", "paligemma_tiny"])
def test_whichever_way_the_prefix_sees_itself(name, attention):
    assert_same(*both_ways(make(name, prefix_attention=attention), length=1000))


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"attn_implementation": "eager"}])
def test_recomputed_or_eager_blocks_too(options):
    assert_same(*both_ways(make("qwen2vl_tiny", **options)))


def test_adapters_learn_the_same():
    padded, packed = both_ways(adapted("qwen2vl_tiny", rank=4))
    assert any("lora_B" in name for name in padded[1])
    assert_same(padded, packed)


def test_what_cannot_take_the_mask_says_why():
    assert "encoder and a decoder" in make("florence2_tiny").cannot_pack
    vlm = make("qwen2vl_tiny")
    assert vlm.cannot_pack is None
    vlm.text_config._attn_implementation = "flash_attention_2"
    assert vlm.cannot_pack == "vlm.attn_implementation=flash_attention_2 takes no mask of pairs of tokens"


def test_a_sample_beyond_a_sliding_window_is_refused():
    vlm = make("paligemma2_tiny")
    vlm.text_config.sliding_window = 20
    with pytest.raises(
        LibrobotError, match=r"a sample has \d+ tokens, more than the 20 .* framework.pack=false"
    ):
        vlm.read_packed(observed(vlm), *answers(vlm))
