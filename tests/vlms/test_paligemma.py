"""PaliGemma and PaliGemma 2 against transformers' own processor and model."""

import copy
from dataclasses import replace

import pytest
import torch
from published import (
    PROMPTS,
    assert_folder_round_trips,
    assert_unused_parameters_are_exact,
    build,
    first_seen_difference,
    observe,
    pictures_by_sample,
)
from transformers import PaliGemmaProcessor

from librobot.types import Observation

OPTIONS = ["paligemma_tiny", "paligemma2_tiny"]


def theirs(vlm, observation: Observation) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of the same pictures and prompts."""
    tokenizer = copy.deepcopy(vlm.tokenizer)
    tokenizer.bos_token, tokenizer.padding_side = "<bos>", "right"
    pictures = copy.deepcopy(vlm.picture_processor)
    pictures.image_seq_length = vlm.tokens_per_picture()
    made = PaliGemmaProcessor(pictures, tokenizer)(
        images=pictures_by_sample(observation), text=observation.prompt, padding=True, return_tensors="pt"
    )
    made.pop("labels")
    return dict(made)


@torch.inference_mode()
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("sides", [((28, 40),), ((28, 40), (32, 32))])
def test_ids_and_outputs_equal_transformers(option, sides):
    vlm = build(option)
    observation = observe(vlm, sides)
    inputs = theirs(vlm, observation)
    assert torch.equal(inputs["input_ids"], observation.inputs["input_ids"])
    assert torch.equal(inputs["attention_mask"].bool(), observation.inputs["attention_mask"])
    context = vlm(observation)
    expected = vlm.model.model(**inputs).last_hidden_state
    assert (context.hidden - expected)[context.mask].abs().max() <= 1e-5
    assert torch.equal(context.next_position, context.mask.sum(1) + 1)


@torch.inference_mode()
@pytest.mark.parametrize("option", OPTIONS)
def test_causal_never_looks_ahead_and_bidirectional_does(option):
    changed = len("B\n")
    assert first_seen_difference(build(option, prefix_attention="causal")) == -changed
    bidirectional = build(option)
    whole = observe(bidirectional, prompts=["reach A"]).inputs["input_ids"].shape[1]
    assert first_seen_difference(bidirectional) == -whole
    both = [build(option, prefix_attention=attention) for attention in ("bidirectional", "causal")]
    outputs = [vlm(observe(vlm)) for vlm in both]
    assert not torch.allclose(outputs[0].hidden, outputs[1].hidden, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_an_absent_first_camera_leaves_what_the_second_alone_gives(option, attention):
    """Also with the first rows of a causal mask empty."""
    vlm = build(option, prefix_attention=attention)
    observation = observe(vlm)
    mask = observation.image_mask | {"camera0": torch.zeros(3, dtype=torch.bool)}
    without = vlm(replace(observation, image_mask=mask))
    images = {"camera1": observation.images["camera1"]}
    alone = replace(observation, images=images, image_mask={"camera1": mask["camera1"]})
    alone = vlm(replace(alone, inputs=vlm.processor(observation.prompt, images)))
    assert without.hidden.isfinite().all()
    assert torch.equal(without.next_position, alone.next_position)
    for row in range(3):
        torch.testing.assert_close(
            without.hidden[row][without.mask[row]], alone.hidden[row][alone.mask[row]], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("option", OPTIONS)
def test_a_saved_folder_gives_the_same_outputs(option, tmp_path):
    assert_folder_round_trips(build(option), option, tmp_path)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("layers", [(), (0, 1), (-1,)])
def test_all_but_the_unused_parameters_get_a_gradient(option, final_norm, layers):
    assert_unused_parameters_are_exact(build(option, final_norm=final_norm), layers)


@torch.inference_mode()
@pytest.mark.parametrize("option", OPTIONS)
def test_the_first_layer_alone_equals_the_first_of_all(option):
    vlm, short = build(option), build(option, num_layers=1, final_norm=False)
    short.load_state_dict(vlm.state_dict(), strict=False)
    assert torch.equal(short(observe(short)).hidden, vlm(observe(vlm), layers=(1,)).hidden)


@torch.inference_mode()
def test_gemma_2_caps_attention_logits_unless_sdpa_is_asked_for():
    vlm = build("paligemma2_tiny")
    with pytest.warns(UserWarning, match="attn_implementation=sdpa does not cap"):
        plain = build("paligemma2_tiny", attn_implementation="sdpa")
    for model in (vlm, plain):
        for block in model.blocks:  # logits far above the cap of 50
            block.self_attn.q_proj.weight.mul_(100)
            block.self_attn.k_proj.weight.mul_(100)
    capped, uncapped = vlm(observe(vlm)), plain(observe(plain))
    assert not torch.allclose(capped.hidden[capped.mask], uncapped.hidden[capped.mask], atol=1e-3)
    for block in vlm.blocks:
        block.self_attn.attn_logit_softcapping = None
    context = vlm(observe(vlm))
    torch.testing.assert_close(
        context.hidden[context.mask], uncapped.hidden[context.mask], atol=1e-4, rtol=1e-4
    )


@torch.inference_mode()
def test_answers_continue_what_the_whole_model_predicts():
    """The first word of an answer is the likeliest next token of transformers' own call."""
    vlm = build("paligemma_tiny")
    observation = observe(vlm, prompts=PROMPTS[:1])
    logits = vlm.model(**theirs(vlm, observation)).logits[0, -1]
    first = vlm.generate(observation, max_new_tokens=1, min_new_tokens=1)
    allowed = logits.clone()
    allowed[vlm.tokenizer.eos_token_id] = -torch.inf
    assert first == [vlm.tokenizer.decode([int(allowed.argmax())], skip_special_tokens=True)]
