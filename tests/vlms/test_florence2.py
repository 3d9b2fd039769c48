"""Florence-2: the encoder as a context, and pi0 on it."""

import json
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from transformers import Florence2Processor

import tiny_models
from librobot.config.build import build
from librobot.errors import LibrobotError
from librobot.types import Observation
from librobot.vlms.florence2 import Florence2


def make(option: str = "florence2_tiny", **changes) -> Florence2:
    torch.manual_seed(0)
    node = OmegaConf.create(tiny_models.node("vlm", option, **changes))
    return build(node, "vlm").eval()


@pytest.fixture(scope="module")
def vlm():
    return make()


def observe(vlm, cameras: int = 2, **changes) -> Observation:
    whole = tiny_models.batch().observation
    names = list(whole.images)[:cameras]
    observation = replace(
        whole,
        images={name: whole.images[name] for name in names},
        image_mask={name: whole.image_mask[name] for name in names},
    )
    observation = replace(observation, **changes)
    return replace(observation, inputs=vlm.processor(observation.prompt, observation.images))


def published_processor(vlm) -> Florence2Processor:
    """transformers' own, over the same tokenizer and picture processor."""
    tokenizer = vlm.tokenizer
    tokenizer.image_token, tokenizer.bos_token, tokenizer.eos_token = "<image>", "<s>", "</s>"
    tokenizer.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    vlm.picture_processor.image_seq_length = vlm.tokens_per_picture()
    tasks = ("ocr", "phrase_grounding", "pure_text", "description_with_bboxes", "description_with_polygons")
    tasks += ("polygons", "bboxes", "description_with_bboxes_or_polygons")
    parsing = {task: {} for task in tasks} | {"ocr": {"pattern": "x", "area_threshold": 0.0}}
    parsing["phrase_grounding"] = {"banned_grounding_tokens": []}
    return Florence2Processor(vlm.picture_processor, tokenizer, post_processor_config=parsing)


def direct(vlm, ids, mask, pixels):
    """What transformers' model gives its decoder, from the same ids and pixels."""
    return vlm.model.model(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=pixels,
        decoder_input_ids=torch.zeros(len(ids), 1, dtype=torch.long),
        output_hidden_states=True,
    )


@torch.no_grad()
def test_one_camera_equals_transformers_processor_and_encoder():
    vlm = make()
    observation = observe(vlm, cameras=1)
    pictures = [image[0] for image in next(iter(observation.images.values()))]
    made = published_processor(vlm)(
        images=pictures, text=observation.prompt, padding=True, return_tensors="pt"
    )
    mask = made["attention_mask"].bool()
    assert torch.equal(observation.inputs["attention_mask"], mask)
    assert torch.equal(observation.inputs["input_ids"][mask], made["input_ids"][mask])
    out = direct(vlm, made["input_ids"], made["attention_mask"], made["pixel_values"])
    context = vlm(observation, layers=(0, 1, -1))
    expected = (*out.encoder_hidden_states[:2], out.encoder_last_hidden_state)
    for ours, theirs in zip(context.layers, expected, strict=True):
        assert (ours - theirs)[mask].abs().max() <= 1e-5
    assert context.keys == context.values == ()
    assert torch.equal(context.next_position, mask.sum(1))


@torch.no_grad()
def test_two_cameras_equal_transformers_encoder(vlm):
    """transformers' processor takes one picture; its model takes as many as there are places."""
    observation = observe(vlm)
    count = vlm.tokens_per_picture()
    ids = [
        vlm.tokenizer("<image>" * (2 * count) + f"<s>{prompt}</s>", add_special_tokens=False)["input_ids"]
        for prompt in observation.prompt
    ]
    context = vlm(observation)
    wrist, front = observation.images["wrist"], observation.images["front"]
    for row, expected_ids in enumerate(ids):
        pixels = vlm.picture_processor(images=[wrist[row, 0], front[row, 0]], return_tensors="pt")
        assert observation.inputs["input_ids"][row][context.mask[row]].tolist() == expected_ids
        alone = torch.tensor([expected_ids])
        out = direct(vlm, alone, torch.ones_like(alone), pixels["pixel_values"])
        difference = context.hidden[row][context.mask[row]] - out.encoder_last_hidden_state[0]
        assert difference.abs().max() <= 1e-5


@torch.no_grad()
def test_an_absent_camera_is_as_if_it_had_never_been(vlm):
    """Learned positions too: the tokens behind it take its places."""
    observation = observe(vlm)
    absent = observation.image_mask | {"wrist": torch.tensor([False, True, False, True])}
    context = vlm(replace(observation, image_mask=absent))
    front = observe(vlm, images={"front": observation.images["front"]})
    front = replace(front, image_mask={"front": torch.ones(4, dtype=torch.bool)})
    without, full = vlm(front), vlm(observation)
    for row in range(4):
        expected = without if row in (0, 2) else full
        ours = context.hidden[row][context.mask[row]]
        torch.testing.assert_close(ours, expected.hidden[row][expected.mask[row]], atol=1e-5, rtol=1e-4)
        assert context.next_position[row] == expected.next_position[row]


@torch.no_grad()
def test_padding_and_batch_mates_do_not_change_a_sample(vlm):
    observation = observe(vlm)
    together = vlm(observation)
    assert not together.mask.all()
    for row in range(4):
        part = slice(row, row + 1)
        images = {name: image[part] for name, image in observation.images.items()}
        masks = {name: mask[part] for name, mask in observation.image_mask.items()}
        prompt = observation.prompt[part]
        alone = vlm(observe(vlm, images=images, image_mask=masks, prompt=prompt, state=torch.zeros(1, 1, 5)))
        assert alone.mask.all()
        expected = together.hidden[row][together.mask[row]]
        torch.testing.assert_close(alone.hidden[0], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_generation_equals_transformers():
    vlm = make()
    for parameter in vlm.parameters():
        parameter.mul_(4.0)  # far enough from uniform for different answers
    observation = observe(vlm)
    text_only = {"min_new_tokens": 12, "suppress_tokens": list(range(256, 320))}
    inputs = observation.inputs
    ids = vlm.model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"].long(),
        max_new_tokens=12,
        do_sample=False,
        **text_only,
        **vlm._pictures(observation),
    )
    expected = vlm.tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert vlm.generate(observation, max_new_tokens=12, **text_only) == expected
    assert len(set(expected)) > 1


@torch.no_grad()
def test_round_trip_through_a_folder(vlm, tmp_path):
    for part in (vlm.model, vlm.tokenizer, vlm.picture_processor):
        part.save_pretrained(tmp_path)
    again = Florence2(checkpoint=str(tmp_path)).eval()
    observation = observe(again)
    assert again.processor.max_positions == 256
    assert torch.equal(again(observation).hidden, vlm(observe(vlm)).hidden)
    assert again.generate(observation, max_new_tokens=5) == vlm.generate(observation, max_new_tokens=5)
    larger = Florence2(checkpoint=str(tmp_path), pictures={"size": {"height": 96, "width": 64}})
    assert larger.tokens_per_picture() == 7
    assert larger(observe(larger)).mask.sum(1).tolist() == [
        2 * 7 + 2 + len(prompt) for prompt in observation.prompt
    ]


@pytest.mark.parametrize("layers", [(), (0,), (1,), (0, 1), (-1,)])
def test_unused_parameters_are_those_without_a_gradient(layers):
    vlm = make().train()
    context = vlm(observe(vlm), layers=layers)
    sum(x[..., 0].square().sum() for x in context.layers or (context.hidden,)).backward()
    unused = {id(p) for p in vlm.unused_parameters(layers)}
    named = list(vlm.named_parameters())
    assert {n for n, p in named if p.grad is None} == {n for n, p in named if id(p) in unused}
    assert vlm.model.model.language_model.shared.weight.grad is not None


def test_untied_embeddings_of_the_decoder_are_unused():
    config = tiny_models.node("vlm", "florence2_tiny")["config"]
    config = config | {"tie_word_embeddings": False}
    config["text_config"]["tie_word_embeddings"] = False
    vlm = make(config=config)
    vlm(observe(vlm)).hidden[..., 0].square().sum().backward()
    unused = {id(p) for p in vlm.unused_parameters((-1,))}
    assert {id(p) for p in vlm.parameters() if p.grad is None} == unused
    assert id(vlm.model.lm_head.weight) in unused


def test_the_first_layers_are_the_encoders(vlm):
    short = make(num_layers=1)
    assert (
        len(short.blocks) == short.geometry.num_layers == short.model.config.text_config.encoder_layers == 1
    )
    assert len(short.model.model.language_model.decoder.layers) == 2


# What is refused.


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"prefix_attention": "causal"}, "both directions"),
        ({"final_norm": False}, "ends with its norm"),
        ({"pictures": {"size": {"shortest_edge": 64}}}, "a height and a width"),
        ({"pictures": {"size": {"height": 64, "width": 1632}}}, r"50 rows and columns .* 2 x 51"),
    ],
)
def test_options_without_a_meaning(option, message):
    with pytest.raises(LibrobotError, match=message):
        make(**option)
    with pytest.raises(ValueError, match=message):
        node = tiny_models.node("vlm", "florence2_tiny", **option)
        Florence2(**{key: value for key, value in node.items() if key != "_target_"})


def test_more_tokens_than_positions():
    vlm = make(pictures={"size": {"height": 384, "width": 256}})
    assert vlm.tokens_per_picture() == 97
    observe(vlm)
    with pytest.raises(LibrobotError, match=r"256 positions, found 257 tokens \(2 pictures of 97 tokens\)"):
        observe(vlm, prompt=["x" * 61] * 4)


def test_the_first_publications_layout_is_named(tmp_path):
    """microsoft/Florence-2-base: transformers has no `florence2_language`."""
    text = {"model_type": "florence2_language", "d_model": 768}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "florence2", "text_config": text, "vision_config": {"model_type": "davit"}})
    )
    with pytest.raises(LibrobotError, match="florence-community/Florence-2-base"):
        Florence2(checkpoint=str(tmp_path))


# pi0, whose expert reads the encoder through learned keys and values.


@pytest.fixture
def policy():
    return tiny_models.build("pi0", vlm="florence2_tiny").eval()


def test_gradients_reach_every_trainable_parameter(policy):
    policy.train()
    tiny_models.fixed_loss(policy, tiny_models.batch()).backward()
    named = list(policy.named_parameters())
    assert {n for n, p in named if p.requires_grad} == {n for n, p in named if p.grad is not None}
    names = {n for n, p in named if p.requires_grad}
    for part in ("learned_cache.k_proj.1", "vlm.model.model.vision_tower", "vlm.model.model.language_model"):
        assert any(n.startswith(part) for n in names)
    assert policy.vlm.blocks[-1].fc2.weight.grad.abs().sum() > 0
    assert not any("decoder" in n for n in names)


@torch.no_grad()
def test_cached_sampling_equals_recomputation(policy):
    observation = tiny_models.batch().observation
    noise = torch.randn(4, tiny_models.HORIZON, policy.action_width)
    calls = []
    policy.vlm.register_forward_hook(lambda *_: calls.append("prefix"))
    policy.learned_cache.register_forward_hook(lambda *_: calls.append("projections"))
    once = policy.sample_actions(observation, noise=noise, num_steps=10)
    assert calls == ["prefix", "projections"]

    def recomputing(x_t, time, context):
        return policy.denoise(x_t, time, policy.condition(observation))

    drawn = policy.head.sample(recomputing, None, tuple(noise.shape), noise=noise, num_steps=10)
    assert len(calls) == 22
    again = policy.physical_actions(drawn[..., : tiny_models.SPEC.action_dim], observation)
    assert torch.equal(once, again)


@torch.no_grad()
def test_a_longer_padded_prompt_changes_nothing(policy):
    observation = tiny_models.batch().observation
    noise = torch.randn(4, tiny_models.HORIZON, policy.action_width)
    longest = replace(observation, prompt=[*observation.prompt[:3], "x" * 90])
    one, other = (policy.sample_actions(o, noise=noise) for o in (observation, longest))
    torch.testing.assert_close(one[:3], other[:3], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(one[3], other[3], atol=1e-5)


def test_a_backbone_with_a_cache_has_no_projections():
    policy = tiny_models.build("pi0")
    assert policy.learned_cache is None
    assert policy.prefix_layers == ()


# Parameters of the safetensors files of microsoft/Florence-2-base and -large, fixed tables included.
PUBLISHED_PARAMETERS = {"florence2": 231_567_705, "florence2_large": 776_721_497}


@pytest.mark.parametrize("option", PUBLISHED_PARAMETERS)
def test_published_sizes(option):
    node = OmegaConf.to_container(tiny_models.load("vlm", option)) | {"pretrained": False}
    with torch.device("meta"):
        vlm = build(OmegaConf.create(node), "vlm")
    count = sum(parameter.numel() for parameter in vlm.model.parameters())
    assert count == pytest.approx(PUBLISHED_PARAMETERS[option], rel=0.01)
    assert vlm.tokens_per_picture() == 577
    assert len(vlm.blocks) == vlm.geometry.num_layers == node["config"]["text_config"]["encoder_layers"]
    assert vlm.geometry.head_dim == 64
    assert len(vlm.vision_blocks) == 12
