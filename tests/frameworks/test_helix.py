"""Helix's facts (Figure 2025), each a test of its name, and what is ours in it."""

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

import tiny_models
from librobot.errors import LibrobotError
from librobot.frameworks.helix import Helix
from librobot.frameworks.slow_thought import in_words, one_step, tokenized
from librobot.heads.regression import L1
from librobot.nn.multiscale import MultiScaleEyes
from librobot.types import Camera, Dim, RobotSpec

UPPER_BODY = RobotSpec(
    name="humanoid",
    cameras=(Camera("head_left", 224, 224), Camera("head_right", 224, 224)),
    state=tuple(Dim(f"s{i}") for i in range(35)),
    action=tuple(Dim(f"a{i}") for i in range(35)),
    control_hz=200.0,
)


def planning(**changes):
    return tiny_models.build("helix", plan=True, max_plan_tokens=12, **changes)


def with_plans(texts: list[str]):
    data = tiny_models.batch(len(texts))
    data.extra["plan"] = texts
    return data


def test_system_1_has_80_million_parameters_and_35_actions():
    options = OmegaConf.to_container(tiny_models.load("framework", "helix"))
    del options["_target_"], options["progress"]
    vlm = tiny_models.build("helix").vlm
    with torch.device("meta"):
        helix = Helix(
            spec=UPPER_BODY, vlm=vlm, head=L1(), optimizer=None, scheduler=None, progress=True, **options
        )
    fast = sum(p.numel() for n, p in helix.named_parameters() if n.startswith("fast_"))
    assert abs(fast / 80e6 - 1) < 0.01
    assert helix.fast_decoder.action_out_proj.out_features == 35 + 1


def test_the_head_is_regression_by_default():
    assert isinstance(tiny_models.build("helix").head, L1)


def test_system_2_emits_one_vector_which_joins_the_visual_tokens():
    helix = tiny_models.build("helix").eval()
    observation = helix.prepare(tiny_models.batch().observation)
    latent = helix.think(observation)
    assert latent.shape == (4, 4)  # latent_dim of the tests
    seen = []
    helix.fast_encoder.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    helix.remember(observation, latent)
    visual = 2 * (16 * 16 + 8 * 8)  # two cameras of 32 pixels, read at 1/2 and 1/4
    assert seen[0].shape[1] == visual + 2  # the state and the latent behind them
    expected = helix.fast_encoder.latent_proj(latent)
    torch.testing.assert_close(seen[0][:, -1], expected)


def test_system_2_sees_one_camera_state_and_instruction():
    helix = tiny_models.build("helix", slow_camera="front").eval()
    observation = helix.prepare(tiny_models.batch().observation)

    def latent(**changes):
        changed = replace(observation, **({"inputs": None} if "prompt" in changes else {}), **changes)
        return helix.think(helix.prepare(changed))

    with torch.inference_mode():
        before = latent()
        other = dict(observation.images)
        assert torch.equal(latent(images=other | {"wrist": 255 - other["wrist"]}), before)
        for change in (
            {"images": other | {"front": 255 - other["front"]}},
            {"state": observation.state + 1},
            {"prompt": ["push the green cube"] * 4},
        ):
            assert not torch.allclose(latent(**change), before, atol=1e-6), change.keys()


def test_the_latent_tells_instructions_apart_from_the_start():
    """A query as large as what it reads drowns it: with unit deviation the ratio is 0.04, not 0.38."""
    torch.manual_seed(0)
    helix = tiny_models.build("helix", latent_dim=64).eval()
    observation = helix.prepare(tiny_models.batch().observation)
    assert helix.slow.query.std() < 0.1
    same = replace(
        observation,
        images={name: image[:1].expand_as(image) for name, image in observation.images.items()},
        state=observation.state[:1].expand_as(observation.state),
        prompt=["reach the red cube", "press the red button", "reach the blue cube", "push the green cube"],
        inputs=None,
    )
    with torch.inference_mode():
        latent = helix.think(helix.prepare(same))
    assert (latent - latent.mean(dim=0)).norm() > 0.2 * latent.norm()


def test_system_1_reads_no_language_but_through_the_latent():
    helix = tiny_models.build("helix").eval()
    observation = helix.prepare(tiny_models.batch().observation)
    latent = torch.zeros(4, 4)
    with torch.inference_mode():
        before, _ = helix.act(observation, latent)
        other = replace(observation, prompt=["push"] * 4, inputs=None)
        assert torch.equal(helix.act(other, latent)[0], before)
        assert not torch.allclose(helix.act(observation, latent + 1)[0], before, atol=1e-5)


def test_the_eyes_are_convolutions_at_several_scales_for_any_size():
    torch.manual_seed(0)
    eyes = MultiScaleEyes((8, 8, 16), num_levels_read=2, blocks_per_level=1, num_groups=4, width=16)
    kinds = {type(m).__name__ for m in eyes.levels.modules()} - {"ModuleList", "Sequential", "ConvBlock"}
    assert kinds == {"Conv2d", "GroupNorm", "ReLU"}
    assert eyes(torch.zeros(1, 3, 32, 32)).shape == (1, 8 * 8 + 4 * 4, 16)
    assert eyes(torch.zeros(1, 3, 48, 16)).shape == (1, 12 * 4 + 6 * 2, 16)


def test_in_training_system_2_sees_the_observation_of_the_deployed_latency_ago():
    """obs_steps 3: an offset of two control steps. System 1 sees the last step."""
    helix = tiny_models.build("helix", obs_steps=3).eval()
    data = tiny_models.batch(obs_steps=3)
    slow, fast = [], []
    helix.vlm.register_forward_pre_hook(lambda module, inputs: slow.append(inputs[0]))
    helix.fast_encoder.register_forward_pre_hook(lambda module, inputs: fast.append(inputs[0]))
    helix.compute_loss(data)
    helix.sample_actions(data.observation)
    for seen, step in [(s, 0) for s in slow] + [(f, 2) for f in fast]:
        for name, image in seen.images.items():
            assert torch.equal(image[:, 0], data.observation.images[name][:, step])
        assert torch.equal(seen.state[:, 0], data.observation.state[:, step])
    assert list(slow[0].images) == ["wrist"]
    assert list(fast[0].images) == ["wrist", "front"]


def test_random_offsets_cover_the_window_in_training_only():
    helix = tiny_models.build("helix", obs_steps=3, offset="random")
    observation = tiny_models.batch(64, obs_steps=3).observation
    torch.manual_seed(0)
    assert set(helix.train().draw_slow_steps(observation).tolist()) == {0, 1, 2}
    assert set(helix.eval().draw_slow_steps(observation).tolist()) == {0}
    data = tiny_models.batch(obs_steps=3)
    with torch.no_grad():
        losses = [helix.compute_loss(data, slow_steps=torch.full((4,), step))[0] for step in range(3)]
    assert len({float(loss) for loss in losses}) == 3


def test_both_systems_learn_from_the_actions():
    helix = tiny_models.build("helix")
    tiny_models.fixed_loss(helix, tiny_models.batch()).backward()
    for part in ("vlm.blocks", "slow", "fast_encoder.eyes", "fast_decoder"):
        assert any(p.grad.abs().sum() > 0 for _, p in helix.named_part(part)), part


def test_progress_is_one_more_action_dimension():
    helix = tiny_models.build("helix", progress=True).eval()
    data = tiny_models.batch()
    with pytest.raises(LibrobotError, match=r"framework.progress=true needs Batch.extra\['progress'\]"):
        helix.compute_loss(data)
    data.extra["progress"] = torch.full((4, 6), 0.25)
    before = helix.compute_loss(data)[0]
    data.extra["progress"] = torch.full((4, 6), 0.75)
    assert helix.compute_loss(data)[0] != before
    observation = helix.prepare(data.observation)
    helix.fast_decoder.action_out_proj.bias.data[-1] += 10  # far above the end
    actions, progress = helix.act(observation, helix.think(observation))
    assert actions.shape == (4, 6, 3)
    assert (progress == 1).all()
    assert helix.sample_actions(data.observation).shape == (4, 6, 3)


def test_a_plan_is_learned_by_cross_entropy_where_a_sample_has_one():
    helix = planning().eval()
    with pytest.raises(LibrobotError, match=r"framework.plan=true needs Batch.extra\['plan'\]"):
        helix.compute_loss(tiny_models.batch())
    data = with_plans(["lift it", "", "go", ""])
    _, metrics = helix.compute_loss(data)
    assert metrics["plan_loss"] > 0
    _, none = helix.compute_loss(with_plans([""] * 4))
    assert none["plan_loss"] == 0
    with pytest.raises(LibrobotError, match=r"max_plan_tokens=12 tokens, found 13: 'twelve bytes'"):
        helix.compute_loss(with_plans(["twelve bytes", "", "", ""]))

    observation = helix.prepare(data.observation)
    prefix = helix.perceive(observation)
    both = tokenized(helix.vlm, ["lift it", "go"], 12, torch.device("cpu"))
    assert both.real.sum(dim=1).tolist() == [8, 3]  # the bytes, and the end
    assert in_words(helix.vlm, both) == ["lift it", "go"]
    data = with_plans(["lift it", "go", "", ""])
    plan = helix._given_plans(data)
    _, entropy = helix.slow.read_plan(helix.vlm, prefix, plan)
    # By hand: one token after the other behind the prefix.
    read = helix.vlm.extend(prefix, helix.slow.plan_start.expand(4, 1, -1))
    total = torch.zeros(4)
    for i in range(8):
        log = helix.vlm.logits(read.hidden[:, -1]).log_softmax(dim=-1)
        total += -log.gather(1, plan.ids[:, i : i + 1])[:, 0] * plan.real[:, i]
        read = helix.vlm.extend(read, helix.vlm.embed_tokens(plan.ids[:, i : i + 1]))
    torch.testing.assert_close(entropy[:2], total[:2] / torch.tensor([8.0, 3.0]), atol=1e-4, rtol=1e-4)


def test_a_plan_comes_before_the_latent_and_changes_it():
    helix = planning().eval()
    observation = helix.prepare(tiny_models.batch().observation)
    plans = [tokenized(helix.vlm, [text] * 4, 12, torch.device("cpu")) for text in ("left", "right", "")]
    left, right, none = (helix.think(observation, plan) for plan in plans)
    assert not torch.allclose(left, right, atol=1e-5)
    plain = helix.slow.latent(
        helix.vlm, helix.perceive(observation), helix.normalized_state(observation)[:, 0]
    )
    torch.testing.assert_close(none, plain, atol=1e-5, rtol=1e-5)  # no plan leaves no trace


def test_a_plan_can_be_learned_and_is_written_in_words():
    torch.manual_seed(0)
    helix = planning(dropout=0.0, plan_weight=1.0).train()
    texts = ["lift", "open it", "push", "press"]
    data = with_plans(texts)
    optimizer = torch.optim.Adam([p for p in helix.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        helix.compute_loss(data)[0].backward()
        optimizer.step()
    helix.eval()
    observation = helix.prepare(data.observation)
    with torch.inference_mode():
        plan, words = helix.plan(one_step(observation, torch.zeros(4, dtype=torch.long)))
        assert words == texts
        torch.testing.assert_close(helix.think(observation), helix.think(observation, plan))


def test_a_backbone_without_a_cache_gives_a_latent_but_no_plan():
    helix = tiny_models.build("helix", vlm="florence2_tiny").eval()
    assert helix.sample_actions(tiny_models.batch().observation).shape == (4, 6, 3)
    with pytest.raises(LibrobotError, match=r"plan needs a backbone .* take a decoder-only one"):
        tiny_models.build("helix", vlm="florence2_tiny", plan=True)


@pytest.mark.parametrize(
    "bad",
    [
        {"offset": "late"},
        {"slow_camera": "wirst"},
        {"max_plan_tokens": 0},
        {"num_levels_read": 3},
        {"num_groups": 3},
        {"num_heads": 5},
    ],
    ids=str,
)
def test_bad_arguments(bad):
    with pytest.raises(LibrobotError, match=next(iter(bad))):
        tiny_models.build("helix", **bad)
