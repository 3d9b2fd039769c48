"""pi0.5 beyond what every framework must hold: each fact of it that differs from pi0."""

import pytest
import torch

import tiny_models
from librobot.errors import LibrobotError
from librobot.frameworks.prompts import StateInPrompt, state_bins


@pytest.fixture
def framework():
    return tiny_models.build("pi05").eval()


def test_256_bins_of_the_normalised_state_by_their_lower_edges():
    """Hand-computed: bin i is [-1 + i / 128, -1 + (i + 1) / 128); below -1 is -1, from 1 on 255."""
    values = torch.tensor([-1.2, -1.0, -0.993, -0.992, -0.001, 0.0, 0.0078, 0.0079, 0.9921, 0.9922, 1.0, 7.0])
    assert state_bins(values.numpy()).tolist() == [-1, 0, 0, 1, 127, 128, 128, 129, 254, 255, 255, 255]


def test_the_prompt_by_hand():
    writer = StateInPrompt(offset=[1.0, 0.0], scale=[2.0, 0.5])
    state = torch.tensor([[[9.0, 9.0], [1.0, 0.25]], [[9.0, 9.0], [3.0, -0.5]]])
    assert writer(["  pick_up the\nred cube ", "open"], state) == [
        "Task: pick up the red cube, State: 128 192;\nAction: ",
        "Task: open, State: 255 0;\nAction: ",
    ]


def test_the_prompt_ends_as_written_without_the_backbones_line_break():
    framework = tiny_models.build("pi05", vlm="paligemma_tiny")
    observation = framework.prepare(tiny_models.batch(1).observation)
    words = framework.vlm.tokenizer
    text = words.decode(observation.inputs["input_ids"][0][observation.inputs["camera"][0] == 0])
    assert text.startswith("<bos>Task: reach the red cube, State: ")
    assert text.endswith(";\nAction: ")
    plain = framework.vlm.processor(["open"])["input_ids"][0]
    assert words.decode(plain) == "<bos>open\n"


def test_long_states_have_200_tokens_of_room(framework):
    assert tiny_models.load("framework", "pi05").max_prompt_tokens == 200
    assert framework.asked.max_tokens == 200
    assert framework.vlm.processor.max_tokens == 96


def test_quantiles_map_to_one_and_are_not_clipped(framework):
    low, high = (torch.tensor(tiny_models.statistics()["state"][key]) for key in ("q01", "q99"))
    given = torch.stack((low, high, 2 * high - low))[None].float()
    found = framework.normalizer.normalize("state", given)[0]
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, 3.0])[:, None].expand(3, 5))


def test_no_state_token_and_the_gates_start_shut():
    framework = tiny_models.build("pi05", modulation="adaln_zero").eval()
    assert framework.state_proj is None
    for name, parameter in framework.expert.named_parameters():
        if "norm" in name:
            assert not parameter.any(), name
    with torch.inference_mode():
        condition = framework.condition(tiny_models.batch().observation)
        x_t, time = torch.randn(4, tiny_models.HORIZON, 8), torch.rand(4)
        place = framework.locate(condition)
        assert place.keys[0].shape[2] == condition.prefix.keys[0].shape[2] + tiny_models.HORIZON
        given = framework.embed_actions(x_t, time)
        plain = torch.nn.functional.rms_norm(given, given.shape[-1:], eps=1e-6)
        torch.testing.assert_close(framework.expert(given, place, framework.embed_time(time)), plain)


@torch.inference_mode()
def test_the_time_reaches_the_norms_and_not_the_tokens(framework):
    condition = framework.condition(tiny_models.batch().observation)
    x_t = torch.randn(4, tiny_models.HORIZON, 8)
    early, late = torch.full((4,), 0.1), torch.full((4,), 0.9)
    assert torch.equal(framework.embed_actions(x_t, early), framework.embed_actions(x_t, late))
    for parameter in framework.expert.parameters():
        parameter.add_(0.1)
    assert not torch.allclose(
        framework.denoise(x_t, early, condition), framework.denoise(x_t, late, condition)
    )


def hybrid(**changes):
    framework = tiny_models.build("pi05", "hybrid", **changes).train()
    framework.head.flow_weight = 1.0
    return framework


def gradients(framework, part: str) -> dict[str, torch.Tensor]:
    """Of the backbone, from one of the two losses alone."""
    framework.zero_grad()
    weights = {"flow": "token_weight", "tokens": "flow_weight"}
    setattr(framework.head, weights[part], 0.0)
    tiny_models.fixed_loss(framework, tiny_models.batch()).backward()
    setattr(framework.head, weights[part], 1.0)
    return {n: p.grad for n, p in framework.vlm.named_parameters() if p.grad is not None and p.grad.any()}


def test_insulation_the_backbone_learns_from_the_tokens_alone():
    framework = hybrid()
    assert gradients(framework, "flow") == {}
    assert len(gradients(framework, "tokens")) > 20
    assert framework.action_out_proj.weight.grad is not None
    framework.head.insulate = False
    assert len(gradients(framework, "flow")) > 20


@torch.inference_mode()
def test_action_tokens_and_action_expert_do_not_see_each_other():
    framework = hybrid().eval()
    data, noise = tiny_models.batch(), torch.randn(4, tiny_models.HORIZON, 8)
    condition = framework.condition(data.observation)
    length = condition.prefix.mask.shape[1]
    framework.decoder(torch.zeros(4, 3, dtype=torch.long), condition)
    assert condition.prefix.mask.shape[1] == length
    before = framework.sample_actions(data.observation, noise=noise)
    framework.tokens.embedding.add_(1.0)
    assert torch.equal(framework.sample_actions(data.observation, noise=noise), before)
    framework.head.sample_from = "tokens"
    assert framework.sample_actions(data.observation, noise=noise).shape == before.shape


def test_a_backbone_that_cannot_write_is_refused_with_the_hybrid_head():
    with pytest.raises(LibrobotError, match="take a decoder-only backbone"):
        tiny_models.build("pi05", "hybrid", vlm="florence2_tiny")
