"""InternVL in transformers' own layout, against transformers."""

import json
from dataclasses import replace

import pytest
import torch
from internvl2_published import build, observe, tiny_node
from transformers import InternVLProcessor, InternVLVideoProcessor

from librobot.vlms.internvl import InternVL2, InternVL3

TILES = {"crop_to_patches": True, "max_patches": 12}


def direct_processor(vlm) -> InternVLProcessor:
    tokenizer = vlm.tokenizer
    names = {"start_image": "<img>", "end_image": "</img>", "context_image": "<IMG_CONTEXT>", "video": "<v>"}
    for name, token in names.items():
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    return InternVLProcessor(vlm.picture_processor, tokenizer, InternVLVideoProcessor(), image_seq_length=4)


@torch.no_grad()
@pytest.mark.parametrize("option", ["internvl2_tiny", "internvl3_tiny"])
@pytest.mark.parametrize("pictures", [{}, TILES])
def test_equal_to_transformers_processor_and_model(option, pictures):
    vlm = build(option, pictures=pictures)
    observation = observe(vlm, sides=((48, 200), (90, 60)), steps=2)
    texts = [
        vlm.template.text(prompt, 4).replace("<img><IMG_CONTEXT></img>", "<IMG_CONTEXT>")
        for prompt in observation.prompt
    ]
    images = [[step for image in observation.images.values() for step in image[i]] for i in range(2)]
    made = direct_processor(vlm)(
        images=images,
        text=texts,
        crop_to_patches=bool(pictures),
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    mask = made["attention_mask"].bool()
    assert torch.equal(observation.inputs["attention_mask"], mask)
    assert torch.equal(observation.inputs["input_ids"][mask], made["input_ids"][mask])
    out = vlm.model.model(
        input_ids=made["input_ids"],
        attention_mask=made["attention_mask"],
        pixel_values=made["pixel_values"],
        output_hidden_states=True,
    )
    context = vlm(observation, layers=(0, 1, -1))
    expected = (out.hidden_states[0], out.hidden_states[1], out.last_hidden_state)
    for found, wanted in zip(context.layers, expected, strict=True):
        torch.testing.assert_close(found[mask], wanted[mask], atol=1e-5, rtol=0)


def test_tiles_follow_from_the_pictures_size():
    vlm = build("internvl2_tiny", pictures=TILES)
    grid = vlm.processor.picture_grid
    assert grid(56, 56) == (1, 4)
    assert grid(56, 112) == (3, 4)  # two tiles and the whole picture
    assert grid(300, 400) == (13, 4)
    assert build("internvl2_tiny").processor.picture_grid(300, 400) == (1, 4)
    with pytest.raises(ValueError, match="a multiple of 28 pixels, found 50 x 50"):
        InternVL2(**tiny_node("internvl2_tiny") | {"pictures": {"size": {"height": 50, "width": 50}}})


@torch.no_grad()
def test_round_trip_through_a_folder(tmp_path):
    vlm = build("internvl3_tiny", pictures={"crop_to_patches": True, "max_patches": 2})
    for part in (vlm.model, vlm.tokenizer, vlm.picture_processor):
        part.save_pretrained(tmp_path)
    again = InternVL3(checkpoint=str(tmp_path)).eval()
    observation = observe(again, sides=((56, 112), (56, 56)))
    made = vlm.processor(observation.prompt, observation.images)
    assert torch.equal(made["input_ids"], observation.inputs["input_ids"])
    assert torch.equal(again(observation).hidden, vlm(observation).hidden)
    single = InternVL3(checkpoint=str(tmp_path), pictures={"crop_to_patches": False})
    assert single.processor.picture_grid(56, 112) == (1, 4)


def test_untied_output_layers_stay_untied(tmp_path):
    """Files from before transformers 5 do not say at the top whether the output layer is the embedding."""
    vlm = build("internvl3_tiny")
    for part in (vlm.model, vlm.tokenizer, vlm.picture_processor):
        part.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = InternVL3(checkpoint=str(tmp_path))
    assert torch.equal(again.model.lm_head.weight, vlm.model.lm_head.weight)
    assert again.model.lm_head.weight is not again.model.get_input_embeddings().weight
    assert json.loads(again.files()["config.json"])["tie_word_embeddings"] is False


@pytest.mark.parametrize("option", ["internvl2_tiny", "internvl3_tiny"])
@pytest.mark.parametrize("layers", [(), (1,), (-1,)])
def test_all_but_the_unused_parameters_get_a_gradient(option, layers):
    vlm = build(option).train()
    context = vlm(observe(vlm), layers=layers)
    outputs = context.layers + context.keys + context.values
    weights = [torch.randn_like(x) for x in outputs]
    sum((x * w).sum() for x, w in zip(outputs, weights, strict=True)).backward()
    unused = {id(p) for p in vlm.unused_parameters(layers)}
    named = list(vlm.named_parameters())
    assert {n for n, p in named if p.grad is None} == {n for n, p in named if id(p) in unused}


@torch.no_grad()
def test_bidirectional_prefix():
    vlm = build("internvl2_tiny", prefix_attention="bidirectional")
    observation = observe(vlm, size=1)
    ids = observation.inputs["input_ids"]
    last = replace(
        observation,
        inputs=observation.inputs | {"input_ids": ids.index_fill(1, torch.tensor([ids.shape[1] - 1]), 7)},
    )
    assert not torch.allclose(vlm(observation).hidden[:, 0], vlm(last).hidden[:, 0], atol=1e-6)
    causal = build("internvl2_tiny")
    assert torch.equal(causal(observation).hidden[:, 0], causal(last).hidden[:, 0])
