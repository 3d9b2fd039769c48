"""LLaVA-1.5 against transformers' own processor and model."""

import copy

import pytest
import torch
from published import (
    assert_folder_round_trips,
    assert_unused_parameters_are_exact,
    build,
    first_seen_difference,
    observe,
    pictures_by_sample,
)
from tokenizers.processors import TemplateProcessing
from transformers import LlavaProcessor

from librobot.types import Observation

# The conversation of llava-hf/llava-1.5-7b-hf: all pictures, each on a line of its own, before the text.
CHAT = (
    "{% for message in messages %}{{ message.role | upper }}: "
    "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def theirs(vlm, observation: Observation) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of the same pictures and prompts."""
    tokenizer = copy.deepcopy(vlm.tokenizer)
    start = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    tokenizer.padding_side = "right"
    config = vlm.model.config
    processor = LlavaProcessor(
        vlm.picture_processor,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    marks = [{"type": "image"}] * len(observation.images)
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [*marks, {"type": "text", "text": prompt}]}],
            add_generation_prompt=True,
        )
        for prompt in observation.prompt
    ]
    pictures = [picture for row in pictures_by_sample(observation) for picture in row]
    return dict(processor(images=pictures, text=texts, padding=True, return_tensors="pt"))


@torch.inference_mode()
@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("sides", [((28, 40),), ((28, 40), (32, 32))])
def test_ids_and_outputs_equal_transformers(sides, strategy):
    vlm = build("llava_tiny")
    vlm.model.config.vision_feature_select_strategy = strategy
    vlm.processor = vlm.make_processor(128)
    observation = observe(vlm, sides)
    inputs = theirs(vlm, observation)
    assert torch.equal(inputs["attention_mask"].bool(), observation.inputs["attention_mask"])
    real = observation.inputs["attention_mask"]
    assert torch.equal(inputs["input_ids"][real], observation.inputs["input_ids"][real])
    context = vlm(observation)
    keys = ("input_ids", "attention_mask", "pixel_values")
    expected = vlm.model.model(**{key: inputs[key] for key in keys}).last_hidden_state
    assert (context.hidden - expected)[context.mask].abs().max() <= 1e-5
    assert torch.equal(context.next_position, context.mask.sum(1))


def test_a_prompt_reads_as_published():
    vlm = build("llava_tiny")
    ids = observe(vlm, sides=((28, 28),), prompts=["open the drawer"]).inputs["input_ids"][0]
    assert vlm.tokenizer.decode(ids) == "<s>USER: " + "<image>" * 4 + "\nopen the drawer ASSISTANT:"


def test_causal_never_looks_ahead_and_bidirectional_does():
    changed = len("B ASSISTANT:")
    assert first_seen_difference(build("llava_tiny")) == -changed
    bidirectional = build("llava_tiny", prefix_attention="bidirectional")
    whole = observe(bidirectional, prompts=["reach A"]).inputs["input_ids"].shape[1]
    assert first_seen_difference(bidirectional) == -whole


def test_a_saved_folder_gives_the_same_outputs(tmp_path):
    assert_folder_round_trips(build("llava_tiny"), "llava_tiny", tmp_path)


@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("layers", [(), (0, 1), (-1,)])
def test_all_but_the_unused_parameters_get_a_gradient(final_norm, layers):
    assert_unused_parameters_are_exact(build("llava_tiny", final_norm=final_norm), layers)


@pytest.mark.parametrize("read", [-1, 1, [0, 2]])
def test_vision_layers_behind_the_one_that_is_read_are_unused(read):
    vlm = build("llava_tiny")
    vlm.model.config.vision_feature_layer = read
    if isinstance(read, list):  # features of several layers side by side
        projector = vlm.model.model.multi_modal_projector
        projector.linear_1 = torch.nn.Linear(2 * projector.linear_1.in_features, vlm.hidden_size)
    assert_unused_parameters_are_exact(vlm, (-1,))


@torch.inference_mode()
def test_the_whole_picture_can_be_squeezed_instead_of_cut():
    whole = {"size": {"height": 28, "width": 28}, "do_center_crop": False}
    for pictures, counts in (({}, False), (whole, True)):
        vlm = build("llava_tiny", pictures=pictures)
        observation = observe(vlm, sides=((28, 84),), prompts=["open"])
        before = vlm(observation).hidden
        observation.images["camera0"][..., :14] = 0  # outside the middle square
        assert torch.equal(before, vlm(observation).hidden) != counts
