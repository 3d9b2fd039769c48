"""Policies of lerobot that predict actions relative to the state: in, out, and beside lerobot's own steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot")

import lerobot_pi
import tiny_models
from librobot.errors import LibrobotError
from librobot.interchange.base import ImportOptions, import_checkpoint
from librobot.interchange.lerobot import export_checkpoint, pi0
from librobot.policy import Policy

NAMES = ["lift", "turn", "hand_gripper"]


@pytest.fixture(params=["pi0", "pi05"])
def written(request, tmp_path, monkeypatch):
    """lerobot's policy, its pre- and postprocessor, and our checkpoint made of its folder."""
    from lerobot.processor import (
        AbsoluteActionsProcessorStep,
        AddBatchDimensionProcessorStep,
        NormalizerProcessorStep,
        PolicyProcessorPipeline,
        RelativeActionsProcessorStep,
        UnnormalizerProcessorStep,
    )

    monkeypatch.setattr(
        pi0, "VARIANTS", {lerobot_pi.WIDTH: "gemma_2b", lerobot_pi.EXPERT_WIDTH: "gemma_300m"}
    )
    theirs = lerobot_pi.reference(
        request.param, monkeypatch, use_relative_actions=True, action_feature_names=NAMES
    )
    folder, config = tmp_path / "theirs", theirs.config
    statistics = tiny_models.statistics()
    named = {"observation.state": statistics["state"], "action": statistics["action"]}
    features = {**config.input_features, **config.output_features}
    moved = RelativeActionsProcessorStep(
        enabled=True, exclude_joints=config.relative_exclude_joints, action_names=NAMES
    )
    steps = [
        AddBatchDimensionProcessorStep(),
        moved,
        NormalizerProcessorStep(features=features, norm_map=config.normalization_mapping, stats=named),
    ]
    theirs.save_pretrained(folder)
    PolicyProcessorPipeline(steps=steps, name="policy_preprocessor").save_pretrained(folder)
    unnormalize = UnnormalizerProcessorStep(
        features=config.output_features, norm_map=config.normalization_mapping, stats=named
    )
    after = [unnormalize, AbsoluteActionsProcessorStep(enabled=True, relative_step=moved)]
    options = ImportOptions(tokenizer=lerobot_pi.tokenizer(tmp_path / "words"))
    path, ours = import_checkpoint(folder, tmp_path / "ours.ckpt", options)
    return steps, after, path, ours


def through(steps, transition):
    for step in steps:
        transition = step(transition)
    return transition


def test_the_robot_gets_lerobots_actions(written, monkeypatch):
    """What the network says goes back through lerobot's steps and through ours to the same actions."""
    from lerobot.lerobot_types import TransitionKey

    before, after, path, ours = written
    assert [dim.name for dim in ours.spec.action] == NAMES
    policy = Policy.from_checkpoint(path, device="cpu")
    data = tiny_models.batch(1)
    state = data.observation.state[0, -1]
    network = torch.randn(1, tiny_models.HORIZON, len(NAMES))
    seen = {"observation.state": state[None]}
    through(before[1:], {TransitionKey.OBSERVATION: seen, TransitionKey.ACTION: None})
    expected = through(after, {TransitionKey.ACTION: network.clone()})[TransitionKey.ACTION][0]
    framework = policy.framework
    physical = framework.normalizer.unnormalize("action", network)
    monkeypatch.setattr(framework, "sample_actions", lambda observation, **_: physical)
    pictures = {name: x[0, 0].permute(1, 2, 0).numpy() for name, x in data.observation.images.items()}
    found = policy.infer({"images": pictures, "state": state.numpy(), "prompt": "lift"})["actions"]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)
    assert np.abs(found[:, 0] - state[0].item()).max() > 0


def test_the_policy_learns_what_lerobots_does(written):
    """lerobot's preprocessor and our representation make the same normalised chunk of absolute actions."""
    from lerobot.lerobot_types import TransitionKey

    before, _, _, ours = written
    data = tiny_models.batch(4)
    state = data.observation.state[:, -1]
    made = through(
        before[1:],
        {TransitionKey.OBSERVATION: {"observation.state": state}, TransitionKey.ACTION: data.actions},
    )
    seen = ours.robots.representation.encode(data.actions, state)
    found = ours.normalized_actions(replace(data, actions=seen))
    torch.testing.assert_close(found, made[TransitionKey.ACTION], rtol=1e-5, atol=1e-5)


def test_it_goes_back(written, tmp_path):
    """Exported, lerobot's own classes read the steps, and imported again the view is the same."""
    from lerobot.policies.factory import _reconnect_relative_absolute_steps
    from lerobot.processor import DataProcessorPipeline

    _, _, path, ours = written
    folder = export_checkpoint(path, tmp_path / "back")
    words = str(tmp_path / "words")
    changed = {"tokenizer_processor": {"tokenizer_name": words}}
    before = DataProcessorPipeline.from_pretrained(folder, "policy_preprocessor.json", overrides=changed)
    after = DataProcessorPipeline.from_pretrained(folder, "policy_postprocessor.json")
    _reconnect_relative_absolute_steps(before, after)
    moved = next(step for step in after.steps if hasattr(step, "relative_step"))
    assert moved.relative_step._build_mask(3) == [True, True, False]
    again = import_checkpoint(folder, tmp_path / "again.ckpt", ImportOptions(tokenizer=words))[1]
    actions, state = torch.randn(2, 4, 3), torch.randn(2, ours.spec.state_dim)
    first, second = (p.robots.representation.encode(actions, state) for p in (ours, again))
    assert torch.equal(first, second)
    assert torch.equal(first[..., 2], actions[..., 2])


def test_a_view_that_lerobot_lacks_is_refused(written, tmp_path):
    from librobot.interchange.lerobot import relative
    from librobot.representation import ActionRepresentation

    ours = written[3]
    policy = Policy(ours, config=ours.run_config, provenance={}, device="cpu")
    robot = ours.robots.representation.robot
    groups = [{"dims": ["lift"], "frame": "relative", "state": [robot.state[2].name]}]
    ours.robots.representation = ActionRepresentation(groups).bind(robot)
    with pytest.raises(LibrobotError, match=r"'lift' is seen otherwise here .* from states \[2\]"):
        relative.exported(policy)
