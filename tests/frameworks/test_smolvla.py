"""SmolVLA's facts: who sees whom, positions, tokens, pictures, its published size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_smolvla_parity
import torch

import tiny_models
from librobot.config.build import build_framework
from librobot.config.compose import compose
from librobot.errors import LibrobotError
from librobot.frameworks.smolvla import llama_mlp_width, uses_self_attention
from librobot.types import Camera, Dim, RobotSpec

HORIZON = tiny_models.HORIZON


@pytest.fixture
def published():
    """The published reading of a backbone of a test's size."""
    return test_smolvla_parity.built().eval()


@pytest.fixture
def observation(monkeypatch):
    monkeypatch.setattr(tiny_models, "SPEC", test_smolvla_parity.SPEC)
    return tiny_models.batch().observation


def test_every_second_layer_from_the_first_on_attends_to_the_actions():
    assert [uses_self_attention(i, 2) for i in range(5)] == [True, False, True, False, True]
    assert not any(uses_self_attention(i, 0) for i in range(5))
    cross = [block.cross for block in tiny_models.build("smolvla").expert]
    assert cross == [False, True]


def test_mlp_width_of_the_published_expert():
    """Width 720 = 3/4 of 960: 4 * 480 = 1920, up to a multiple of 256."""
    assert llama_mlp_width(720) == 2048


def test_an_action_sees_the_actions_before_it():
    framework = tiny_models.build("smolvla").eval()
    condition = framework.condition(tiny_models.batch().observation)
    x_t, time = torch.randn(4, HORIZON, 8), torch.full((4,), 0.5)
    before = framework.denoise(x_t, time, condition)
    for step in range(HORIZON):
        changed = x_t.clone()
        changed[:, step] += 1.0
        after = framework.denoise(changed, time, condition)
        moved = (after - before).abs().amax(dim=(0, 2)) > 0
        assert moved.tolist() == [other >= step for other in range(HORIZON)]


def test_without_self_attention_an_action_sees_no_other():
    framework = tiny_models.build("smolvla", self_attention_every=0).eval()
    condition = framework.condition(tiny_models.batch().observation)
    x_t, time = torch.randn(4, HORIZON, 8), torch.full((4,), 0.5)
    changed = x_t.clone()
    changed[:, 2] += 1.0
    moved = framework.denoise(changed, time, condition) != framework.denoise(x_t, time, condition)
    assert moved.any(dim=2).any(dim=0).tolist() == [step == 2 for step in range(HORIZON)]


def test_the_state_is_the_last_prefix_token_and_nobody_before_it_sees_it(published, observation):
    one = published.condition(observation)
    other = published.condition(replace(observation, state=observation.state + 1))
    length = one.seen.mask.shape[1]
    assert one.prefix.mask.shape[1] == length + 1
    assert torch.equal(one.prefix.next_position, one.seen.next_position + 1)
    for keys, changed in zip(one.prefix.keys, other.prefix.keys, strict=True):
        assert torch.equal(keys[:, :, :length], changed[:, :, :length])
        assert not torch.allclose(keys[:, :, length], changed[:, :, length])


def test_pictures_and_instruction_see_each_other(published, observation):
    """The first token, of a picture, changes with the instruction's last one."""
    one, other = (
        published.condition(replace(observation, prompt=[text] * 4, inputs=None))
        for text in ("open a", "open b")
    )
    assert not torch.allclose(one.seen.keys[-1][:, :, 0], other.seen.keys[-1][:, :, 0], atol=1e-7)


def test_tokens_are_pictures_then_the_instruction_and_one_newline(published, observation):
    vlm = published.vlm
    for prompt in ("open", "open\n"):
        ids = vlm.processor([prompt], observation.images)["input_ids"][0].tolist()
        picture = [vlm.processor.image_token_id] * vlm.tokens_per_picture()
        text = vlm.tokenizer("open\n", add_special_tokens=False)["input_ids"]
        assert ids == 2 * picture + text


def test_pictures_are_padded_on_the_left_and_on_top_into_minus_one_to_one(published):
    """A white picture twice as high as wide fills the right half of the square."""
    white = torch.full((3, 40, 20), 255, dtype=torch.uint8)
    pixels = published.vlm.picture_inputs([white], 1)["pixel_values"][0, 0]
    assert pixels.shape == (3, 32, 32)
    assert (pixels[:, :, :16] == -1).all()
    assert (pixels[:, :, 16:] == 1).all()


def test_embeddings_are_scaled_and_the_rotary_base_is_ten_thousand(published):
    vlm = published.vlm
    ids = torch.tensor([[5, 6]])
    plain = torch.nn.functional.embedding(ids, vlm.text.embed_tokens.weight)
    torch.testing.assert_close(vlm.embed_tokens(ids), plain * vlm.hidden_size**0.5)
    assert vlm.geometry.rope_theta == 10_000.0
    frequency = vlm.text.rotary_emb.inv_freq
    torch.testing.assert_close(frequency[1], torch.tensor(10_000.0 ** (-2 / vlm.geometry.head_dim)))


def test_the_prefix_is_projected_once_for_all_steps(monkeypatch):
    framework = tiny_models.build("smolvla").eval()
    calls = []
    for block in framework.expert:
        block.attention.k_proj.register_forward_hook(lambda *_, cross=block.cross: calls.append(cross))
    with torch.no_grad():
        framework.sample_actions(tiny_models.batch().observation, num_steps=5)
    assert calls.count(True) == 1
    assert calls.count(False) == 5


def test_the_backbone_does_not_train_by_default():
    framework = tiny_models.build("smolvla")
    assert not any(p.requires_grad for p in framework.vlm.parameters())
    assert framework.state_proj.weight.requires_grad


def test_a_backbone_without_a_cache_is_refused():
    with pytest.raises(LibrobotError, match="Florence2 has none; take vlm=smolvla"):
        tiny_models.build("smolvla", vlm="florence2_tiny")


@pytest.mark.slow
def test_parameters_of_the_published_size():
    """lerobot/smolvla_base: 450M, of which the recipe trains 100M."""
    dims = tuple(Dim(str(i)) for i in range(6))
    spec = RobotSpec("so100", tuple(Camera(f"camera{i}", 256, 256) for i in range(3)), dims, dims, 30.0)
    with torch.device("meta"):
        made = build_framework(compose(["framework=smolvla", "vlm=smolvla", "vlm.pretrained=false"]), spec)
    assert sum(p.numel() for p in made.parameters()) == 450_046_176
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == 99_880_992
