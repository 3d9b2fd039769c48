"""What every published family must hold, on small models of its own classes with random weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

import tiny_models
from librobot.config.build import build
from librobot.errors import LibrobotError
from librobot.vlms.prefix import continued

FAMILIES = [name for name in tiny_models.options("vlm") if name.endswith("_tiny")]


def make(name: str, seed: int = 0, **changes):
    torch.manual_seed(seed)
    return build(OmegaConf.create(tiny_models.node("vlm", name, **changes)), "vlm").eval()


def observe(vlm, **changes):
    observation = replace(tiny_models.batch().observation, **changes)
    return replace(observation, inputs=vlm.processor(observation.prompt, observation.images))


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def cached(name):
    """A family whose language model has a causal cache."""
    vlm = make(name)
    if not vlm.has_cache:
        pytest.skip("an encoder's context has no cache")
    return vlm


@torch.inference_mode()
def test_outputs_equal_a_direct_call_of_the_transformers_model(cached):
    """Positions, masks and picture tokens made by transformers itself from the same ids and pixels."""
    observation = observe(cached)
    context = cached(observation, layers=(0, 1, -1))
    inputs = observation.inputs
    expected = cached.model.model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"].long(),
        output_hidden_states=True,
        **cached.text_inputs(inputs),
        **cached._pictures(observation),
    )
    states = (expected.hidden_states[0], expected.hidden_states[1], expected.last_hidden_state)
    for ours, theirs in zip(context.layers, states, strict=True):
        assert (ours - theirs)[context.mask].abs().max() <= 1e-5


@torch.inference_mode()
def test_tokens_behind_the_cached_prefix_equal_one_pass_over_everything(cached):
    """Causal families: later tokens read the cache. (A bidirectional prefix does not see what follows.)"""
    if not cached.causal:
        cached.set_causal(True)
        cached.causal = True
    observation = observe(cached, prompt=["push the red cube"] * 4)
    whole = cached(observation)
    ids, positions = observation.inputs["input_ids"], observation.inputs["position_ids"]
    cut = ids.shape[1] - 3
    prefix = {k: v[..., :cut] if v.shape[-1] == ids.shape[1] else v for k, v in observation.inputs.items()}
    first = cached(replace(observation, inputs=prefix))
    rest = cached.text(
        inputs_embeds=cached.model.get_input_embeddings()(ids[:, cut:]),
        attention_mask=torch.ones_like(ids),
        position_ids=cached.model_positions(positions[..., cut:]),
        past_key_values=continued(first.keys, first.values),
        use_cache=True,
    )
    torch.testing.assert_close(rest.last_hidden_state, whole.hidden[:, cut:], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_bidirectional_prefix_sees_ahead_and_a_causal_one_does_not(name):
    for attention, sees in (("causal", False), ("bidirectional", True)):
        if attention == "causal" and not make(name).has_cache:
            with pytest.raises(LibrobotError, match="prefix_attention=causal"):
                make(name, prefix_attention=attention)
            continue
        vlm = make(name, prefix_attention=attention)
        one, other = (vlm(observe(vlm, prompt=[text] * 4)) for text in ("open it", "open in"))
        changed = not torch.allclose(one.hidden[:, 0], other.hidden[:, 0], atol=1e-7)
        assert changed == sees, attention


@torch.inference_mode()
def test_the_first_generated_token_is_the_likeliest_one(cached):
    """Rows of different lengths: generation pads on the other side."""
    observation = observe(cached)
    context = cached(observation)
    last = context.mask.sum(1) - 1
    logits = cached.model.get_output_embeddings()(context.hidden[torch.arange(4), last])
    expected = cached.tokenizer.batch_decode(logits.argmax(-1)[:, None], skip_special_tokens=True)
    assert cached.generate(observation, max_new_tokens=1) == expected


@torch.inference_mode()
def test_a_saved_folder_is_a_checkpoint(name, tmp_path):
    vlm = make(name)
    for part in (vlm.model, vlm.tokenizer, vlm.picture_processor):
        part.save_pretrained(tmp_path)
    attention = vlm.text_config._attn_implementation
    again = type(vlm)(checkpoint=str(tmp_path), attn_implementation=attention).eval()
    assert all(
        torch.equal(one, other)
        for one, other in zip(vlm.state_dict().values(), again.state_dict().values(), strict=True)
    )
    one, other = vlm(observe(vlm)), again(observe(again))
    assert torch.equal(one.hidden, other.hidden)
    assert torch.equal(one.next_position, other.next_position)


@torch.inference_mode()
def test_keeping_the_first_layers_gives_the_full_models_hidden_state(name):
    full = make(name)
    options = {"final_norm": False} if full.has_cache else {}
    short = make(name, num_layers=1, **options)
    assert len(short.blocks) == short.geometry.num_layers == 1
    missing = set(full.state_dict()) - set(short.state_dict())
    assert missing
    assert sum(p.numel() for p in short.parameters()) < sum(p.numel() for p in full.parameters())
    short.load_state_dict({k: v for k, v in full.state_dict().items() if k not in missing})
    expected = full(observe(full), layers=(1,))
    compared = expected.mask
    if name == "qwen3vl_tiny":  # its picture tokens get DeepStack's features after the block
        compared = compared & (observe(full).inputs["camera"] == 0)
    assert torch.equal(short(observe(short)).hidden[compared], expected.hidden[compared])


def test_recomputing_activations_changes_no_gradient(name):
    gradients = []
    for recompute in (False, True):
        vlm = make(name, gradient_checkpointing=recompute).train()
        torch.manual_seed(1)
        context = vlm(observe(vlm), layers=(1, -1))
        outputs = context.layers + context.keys + context.values
        sum(x.square().sum() for x in outputs).backward()
        gradients.append({n: p.grad for n, p in vlm.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], atol=1e-5, rtol=1e-4)


def test_named_parts_freeze_and_the_last_layers_train(name):
    vlm = make(name)
    for part in vlm.parts:
        frozen = make(name, freeze=[part])
        still = [n for n, p in frozen.model.named_parameters() if not p.requires_grad]
        assert still
        assert all(frozen.part_of(n) == part for n in still)
        assert len(still) == sum(frozen.part_of(n) == part for n, _ in frozen.model.named_parameters())
    last = make(name, train_last_layers=1)
    trains = [any(p.requires_grad for p in block.parameters()) for block in last.blocks]
    assert trains == [False] * (len(trains) - 1) + [True]
    with pytest.raises(LibrobotError, match="did you mean 'vision'"):
        make(name, freeze=["visoin"])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(4, 1, 1, 32, 32, dtype=torch.uint8), "three channels"),
        (torch.zeros(4, 1, 3, 0, 32, dtype=torch.uint8), "at least one"),
        (torch.full((4, 1, 3, 32, 32), 2.0), "lie in \\[0, 1\\]"),
        (torch.zeros(4, 1, 3, 32, 32, dtype=torch.int32), "uint8"),
    ],
)
def test_a_wrong_picture_is_named(name, image, message):
    vlm = make(name)
    observation = observe(vlm)
    wrong = replace(observation, images=dict(observation.images) | {"front": image})
    with pytest.raises(LibrobotError, match=message) as error:
        vlm(wrong)
    assert "'front'" in str(error.value)


@torch.inference_mode()
def test_float_pictures_are_the_same_pictures(name):
    vlm = make(name)
    observation = observe(vlm)
    floats = {key: image.float() / 255 for key, image in observation.images.items()}
    same = vlm(replace(observation, images=floats))
    assert torch.equal(same.hidden, vlm(observation).hidden)


def test_a_long_instruction_is_cut_with_a_warning(name):
    vlm = make(name, max_prompt_tokens=8)
    with pytest.warns(UserWarning, match="max_prompt_tokens=8 tokens, found 23: everything after 'open the'"):
        cut = vlm.processor(["open the drawer, please."[:23]])
    assert torch.equal(cut["input_ids"], vlm.processor(["open the"])["input_ids"])


def test_checkpoints_that_cannot_be_read(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries again and again
    cls = type(make(name))
    with pytest.raises(LibrobotError, match=r"vlm\.checkpoint=FOLDER"):
        cls(checkpoint="nobody/nothing")
    with pytest.raises(LibrobotError, match=r"does not hold a complete model.*config\.json"):
        cls(checkpoint=str(tmp_path))
    with pytest.raises(ValueError, match="pretrained=false"):
        cls()
    other = make("qwen3vl_tiny" if name == "qwen2vl_tiny" else "qwen2vl_tiny")
    other.model.config.save_pretrained(tmp_path)
    with pytest.raises(LibrobotError, match="choose the vlm= option of that family"):
        cls(checkpoint=str(tmp_path))


def test_an_attention_that_is_not_installed_says_what_to_install(name):
    with pytest.raises(LibrobotError, match="pip install flash-attn"):
        make(name, attn_implementation="flash_attention_2")
    with pytest.raises(LibrobotError, match="did you mean 'sdpa'"):
        make(name, attn_implementation="spda")


@torch.inference_mode()
def test_eager_attention_gives_the_same_numbers(name):
    one, other = make(name), make(name, attn_implementation="eager")
    other.load_state_dict(one.state_dict())
    a, b = one(observe(one)), other(observe(other))
    torch.testing.assert_close(a.hidden[a.mask], b.hidden[b.mask], atol=1e-5, rtol=1e-4)
