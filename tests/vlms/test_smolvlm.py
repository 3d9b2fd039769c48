"""SmolVLM2 against transformers' own processor and model."""

from dataclasses import replace

import pytest
import torch
from published import (
    PROMPTS,
    assert_folder_round_trips,
    assert_unused_parameters_are_exact,
    build,
    build_published,
    first_seen_difference,
    observe,
    pictures_by_sample,
)
from transformers import SmolVLMProcessor, SmolVLMVideoProcessor
from transformers.models.smolvlm import processing_smolvlm

from librobot.types import Observation

SPLIT = {"do_image_splitting": True, "size": {"longest_edge": 96}}


@pytest.fixture
def theirs(monkeypatch):
    """What transformers' processor makes of the same pictures and prompts."""
    monkeypatch.setattr(processing_smolvlm, "num2words", str)  # it writes numbers of video frames only

    def make(vlm, observation: Observation) -> dict[str, torch.Tensor]:
        processor = SmolVLMProcessor(
            vlm.picture_processor,
            vlm.tokenizer,
            SmolVLMVideoProcessor(),
            image_seq_len=vlm.tokens_per_picture(),
            chat_template=processing_smolvlm.DEFAULT_CHAT_TEMPLATE,
        )
        marks = [{"type": "image"}] * len(observation.images)
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [*marks, {"type": "text", "text": prompt}]}],
                add_generation_prompt=True,
            )
            for prompt in observation.prompt
        ]
        images = pictures_by_sample(observation) if observation.images else None
        return dict(
            processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt")
        )

    return make


@torch.inference_mode()
@pytest.mark.parametrize("pictures", [{"size": {"longest_edge": 32}}, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("sides", [(), ((28, 40),), ((28, 40), (32, 32)), ((30, 90), (64, 20))])
def test_ids_and_outputs_equal_transformers(theirs, sides, pictures):
    vlm = build("smolvlm2_tiny", pictures=pictures)
    observation = observe(vlm, sides)
    inputs = theirs(vlm, observation)
    assert torch.equal(inputs["input_ids"], observation.inputs["input_ids"])
    assert torch.equal(inputs["attention_mask"].bool(), observation.inputs["attention_mask"])
    context = vlm(observation)
    keys = ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask")
    expected = vlm.model.model(**{key: inputs[key] for key in keys if key in inputs}).last_hidden_state
    assert (context.hidden - expected)[context.mask].abs().max() <= 1e-5
    assert torch.equal(context.next_position, context.mask.sum(1))


def test_splitting_adds_a_whole_pictures_tokens_for_every_tile():
    vlm = build("smolvlm2_tiny", pictures=SPLIT)
    camera = observe(vlm, sides=((30, 90), (32, 32))).inputs["camera"]
    per_tile = vlm.tokens_per_picture()
    assert per_tile == 4
    assert ((camera == 1).sum(1) == (3 * 1 + 1) * per_tile).all()  # 96 x 32 pixels in tiles of 32
    assert ((camera == 2).sum(1) == (3 * 3 + 1) * per_tile).all()


@torch.inference_mode()
def test_an_even_grey_picture_is_not_taken_for_padding():
    """Its normalised pixels are exactly zero, which transformers' model reads as no picture at all."""
    vlm = build("smolvlm2_tiny")
    observation = observe(vlm)

    def with_level(level: float):
        images = {"camera0": torch.full((len(PROMPTS), 1, 3, 32, 32), level)}
        images |= {"camera1": observation.images["camera1"] / 255}
        return vlm(replace(observation, images=images)).hidden

    grey, lighter = with_level(0.5), with_level(0.5 + 1e-4)
    assert (grey - lighter).abs().max() < 1e-3
    assert not torch.equal(grey, with_level(0.75))


def test_causal_never_looks_ahead_and_bidirectional_does():
    changed = len("B") + 1 + len("\nAssistant:")  # <end_of_utterance> is one token
    assert first_seen_difference(build("smolvlm2_tiny")) == -changed
    bidirectional = build("smolvlm2_tiny", prefix_attention="bidirectional")
    whole = observe(bidirectional, prompts=["reach A"]).inputs["input_ids"].shape[1]
    assert first_seen_difference(bidirectional) == -whole


def test_a_saved_folder_gives_the_same_outputs(tmp_path):
    assert_folder_round_trips(build("smolvlm2_tiny"), "smolvlm2_tiny", tmp_path)


@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("layers", [(), (0, 1), (-1,)])
def test_all_but_the_unused_parameters_get_a_gradient(final_norm, layers):
    assert_unused_parameters_are_exact(build("smolvlm2_tiny", final_norm=final_norm), layers)


@pytest.mark.parametrize(
    ("option", "side", "tokens"),
    [("smolvlm2", 512, 64), ("smolvlm2_256m", 512, 64), ("smolvlm2_2b", 384, 81)],
)
def test_tokens_and_pixels_of_a_picture_at_the_published_sizes(option, side, tokens):
    vlm = build_published(option)
    camera = torch.zeros(1, 1, 3, 48, 64, dtype=torch.uint8)
    inputs = vlm.processor(["open"], {"front": camera})
    assert int((inputs["camera"] == 1).sum()) == tokens
    assert vlm.picture_inputs([camera[0, 0]], 1)["pixel_values"].shape == (1, 1, 3, side, side)
