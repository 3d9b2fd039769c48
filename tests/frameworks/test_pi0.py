"""pi0 beyond what every framework must hold: blocks, cache, padding."""

from dataclasses import replace

import pytest
import torch

import tiny_models
from librobot.errors import LibrobotError
from librobot.nn.attention import block_mask, with_self
from librobot.nn.positions import apply_rotary, rotary_angles
from librobot.types import Batch


@pytest.fixture
def framework():
    return tiny_models.build("pi0").eval()


def jointly(framework, x_t, time, condition, observation):
    """The paper's own formulation: in every layer one attention over the tokens of both transformers, under
    one block mask, with nothing cached."""
    vlm = framework.vlm
    prefix, prefix_mask = vlm.embed(observation)
    suffix = torch.cat((framework.state_proj(condition.state), framework.embed_actions(x_t, time)), dim=1)
    suffix_blocks = torch.tensor([1] + [2] * tiny_models.HORIZON).expand(len(suffix), -1)
    split = prefix.shape[1]
    blocks = torch.cat((torch.zeros_like(prefix_mask, dtype=torch.long), suffix_blocks), dim=1)
    real = torch.cat((prefix_mask, torch.ones_like(suffix_blocks, dtype=torch.bool)), dim=1)
    mask = with_self(block_mask(blocks, blocks, real))
    angles = rotary_angles(real.cumsum(1) - 1, vlm.geometry.head_dim, vlm.geometry.rope_theta)

    for ours, theirs in zip(vlm.blocks, framework.expert.layers, strict=True):
        parts = []
        for block, x in ((ours, prefix), (theirs, suffix)):
            normed = block.attention_norm(x)
            normed = normed[0] if isinstance(normed, tuple) else normed  # the expert's comes with its gate
            heads = [
                proj(normed).unflatten(-1, (-1, vlm.geometry.head_dim)).transpose(1, 2)
                for proj in (block.attention.q_proj, block.attention.k_proj, block.attention.v_proj)
            ]
            parts.append(heads)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*parts, strict=True))
        group = q.shape[1] // k.shape[1]
        q, k = apply_rotary(q, angles), apply_rotary(k, angles)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        weights = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        out = weights.masked_fill(~mask[:, None], float("-inf")).softmax(-1) @ v
        out = out.transpose(1, 2).flatten(2)
        prefix = prefix + ours.attention.o_proj(out[:, :split])
        suffix = suffix + theirs.attention.o_proj(out[:, split:])
        prefix = prefix + ours.mlp(ours.mlp_norm(prefix))
        suffix = suffix + theirs.mlp(theirs.mlp_norm(suffix)[0])
    return framework.action_out_proj(framework.expert.norm(suffix)[0][:, 1:])


@torch.inference_mode()
def test_the_cache_gives_what_joint_attention_gives(framework):
    observation = tiny_models.batch().observation
    observation.image_mask["wrist"] = torch.tensor([True, False, True, True])
    condition = framework.condition(observation)
    x_t = torch.randn(4, tiny_models.HORIZON, framework.action_width)
    time = torch.rand(4)
    expected = jointly(framework, x_t, time, condition, framework.prepare(observation))
    torch.testing.assert_close(framework.denoise(x_t, time, condition), expected, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_the_prefix_runs_once_and_exactly(framework):
    observation = tiny_models.batch().observation
    noise = torch.randn(4, tiny_models.HORIZON, framework.action_width)
    calls = []
    framework.vlm.register_forward_hook(lambda *_: calls.append(1))
    once = framework.sample_actions(observation, noise=noise, num_steps=10)
    assert len(calls) == 1

    def recomputing(x_t, time, context):
        return framework.denoise(x_t, time, framework.condition(observation))

    shape = tuple(noise.shape)
    drawn = framework.head.sample(recomputing, None, shape, noise=noise, num_steps=10)
    again = framework.physical_actions(drawn[..., : tiny_models.SPEC.action_dim], observation)
    assert len(calls) == 11
    assert torch.equal(once, again)


@torch.inference_mode()
def test_what_is_kept_between_steps_changes_nothing(framework):
    """The state token sees no action, so that its keys and values are made once, beside the prefix's; the
    actions' own are written over those of the step before."""
    condition = framework.condition(tiny_models.batch().observation)
    kept = replace(condition, place=framework.locate(condition))
    assert kept.place.room
    assert kept.place.keys[0].shape[2] == condition.prefix.keys[0].shape[2] + 1 + tiny_models.HORIZON
    for _ in range(3):
        x_t = torch.randn(4, tiny_models.HORIZON, framework.action_width)
        time = torch.rand(4)
        before = [buffer.data_ptr() for buffer in kept.place.keys]
        given, expected = (framework.denoise(x_t, time, c) for c in (kept, condition))
        assert torch.equal(given, expected)
        assert [buffer.data_ptr() for buffer in kept.place.keys] == before
    with torch.inference_mode(False), torch.enable_grad():
        condition = framework.condition(tiny_models.batch().observation)
        with_gradient = framework.denoise(x_t.clone(), time.clone(), condition)
    torch.testing.assert_close(with_gradient, given, atol=1e-6, rtol=1e-5)


@torch.inference_mode()
def test_actions_see_each_other_in_both_directions(framework):
    condition = framework.condition(tiny_models.batch().observation)
    x_t, time = torch.randn(4, tiny_models.HORIZON, framework.action_width), torch.rand(4)
    before = framework.denoise(x_t, time, condition)
    for changed, watched in ((0, -1), (-1, 0)):
        other = x_t.clone()
        other[:, changed] += 1
        after = framework.denoise(other, time, condition)
        assert not torch.allclose(after[:, watched], before[:, watched], atol=1e-6)


def test_padded_dimensions_do_not_change_the_loss(framework):
    data = tiny_models.batch()
    noise = torch.randn(4, tiny_models.HORIZON, framework.action_width)
    time = torch.rand(4)
    before, _ = framework.compute_loss(data, noise=noise, time=time)
    before.backward()
    gradient = framework.action_out_proj.weight.grad
    real = tiny_models.SPEC.action_dim
    assert framework.action_width == 8
    assert (gradient[real:] == 0).all()
    assert (gradient[:real] != 0).any()
    with torch.no_grad():
        framework.action_out_proj.weight[real:] += 1.0
    after, _ = framework.compute_loss(data, noise=noise, time=time)
    assert torch.equal(before, after)


def test_no_padding_and_the_papers_width():
    framework = tiny_models.build("pi0", max_state_dim=None, max_action_dim=None, expert_width=None)
    assert framework.action_in_proj.in_features == tiny_models.SPEC.action_dim
    assert framework.state_proj.in_features == tiny_models.SPEC.state_dim
    assert framework.width == framework.vlm.hidden_size // 2
    assert torch.isfinite(tiny_models.fixed_loss(framework, tiny_models.batch()))


@pytest.mark.parametrize("name", ["max_action_dim", "max_state_dim"])
def test_a_robot_with_more_dimensions_is_refused(name):
    with pytest.raises(LibrobotError, match=name):
        tiny_models.build("pi0", **{name: 2})


def test_what_cannot_train_is_frozen(framework):
    """The last layer's part behind its keys and values never reaches the action expert."""
    last = framework.vlm.blocks[-1]
    assert not last.mlp.gate.weight.requires_grad
    assert last.attention.k_proj.weight.requires_grad
    assert framework.vlm.blocks[0].mlp.gate.weight.requires_grad


@pytest.mark.slow
def test_overfits_one_batch():
    """Flow matching, sampling and normalisation agree: after training, samples are the demonstrations."""
    torch.manual_seed(0)
    framework = tiny_models.build("pi0", expert_width=32)
    data = tiny_models.batch(2)
    data = Batch(data.observation, data.actions, torch.ones_like(data.action_mask))
    optimizer = torch.optim.Adam([p for p in framework.parameters() if p.requires_grad], lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        optimizer.zero_grad()
        loss, _ = framework.compute_loss(data)
        loss.backward()
        optimizer.step()
        decay.step()
    with torch.inference_mode():
        sampled = framework.normalizer.normalize("action", framework.eval().sample_actions(data.observation))
    target = framework.normalizer.normalize("action", data.actions)
    untrained = (target - target.mean()).abs().mean()
    assert (sampled - target).abs().mean() < 0.3 * untrained


@pytest.mark.slow
@torch.inference_mode()
def test_a_compiled_expert_gives_the_same_actions(framework):
    compiled = tiny_models.build("pi0", compile="default").eval()
    compiled.load_weights(framework.state_dict())
    observation = tiny_models.batch().observation
    noise = torch.randn(4, tiny_models.HORIZON, framework.action_width)
    found, expected = (f.sample_actions(observation, noise=noise) for f in (compiled, framework))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_an_unknown_way_to_compile_is_refused():
    with pytest.raises(LibrobotError, match="compile must be null or one of default"):
        tiny_models.build("pi0", compile="fast")
