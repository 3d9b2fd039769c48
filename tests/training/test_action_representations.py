"""Policies that see relative actions, or rotations by other numbers: trained, saved, and asked again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import FRAMES, fit

from librobot.data.datamodule import DataModule
from librobot.data.seen_actions import seen_statistics
from librobot.data.sources.lerobot import LeRobotSource
from librobot.data.statistics import vector_statistics
from librobot.data.writer import LeRobotWriter
from librobot.errors import LibrobotError
from librobot.policy import Policy
from librobot.representation import ActionRepresentation
from librobot.types import Camera, Dim, RobotSpec

ANGLES = [Dim(name, "rad", "ee_rotation") for name in ("roll", "pitch", "yaw")]
ARM = RobotSpec(
    name="arm",
    cameras=(Camera("front", 32, 32),),
    state=(Dim("x", "m", "ee_position"), *ANGLES),
    action=(Dim("x", "m", "ee_position"), *ANGLES, Dim("grip", kind="gripper")),
    control_hz=10.0,
)
FAR = 1000.0
SEES = [{"dims": ["gripper"]}, {"dims": ["x"], "frame": "relative"}]
ROT6D = {"dims": ["ee_rotation"], "rotation": "euler", "to": "rot6d", "frame": "relative"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An arm far from the origin, in a direction that differs by episode: relative actions are small."""
    root = tmp_path_factory.mktemp("arm") / "data"
    random = np.random.default_rng(0)
    with LeRobotWriter(root, ARM, fps=10) as writer:
        for episode in range(4):
            length = FRAMES // 4
            state = random.normal(scale=0.1, size=(length, 4)).astype(np.float32)
            state[:, 0] += FAR * (episode + 1)
            state[:, 1] += 3.1
            action = np.concatenate([state + 0.05, np.ones((length, 1), np.float32)], axis=1)
            images = random.integers(0, 255, (length, 32, 32, 3), dtype=np.uint8)
            writer.add_episode(images={"front": images}, state=state, action=action, task="go")
    return root


def test_statistics_are_those_of_what_the_policy_sees(dataset):
    source = LeRobotSource(dataset)
    seen = ActionRepresentation(SEES).bind(source.spec)
    found = seen_statistics(source, seen, {"horizon": 3, "obs_steps": 1})
    chunks = []
    ends = np.cumsum(source.episode_lengths)
    for end, length in zip(ends, source.episode_lengths, strict=True):
        for row in range(end - length, end):
            own = np.arange(row, min(row + 3, end))
            chunks.append(source.actions(own)[:, 0] - source.states(np.array([row]))[:, 0])
    expected = vector_statistics(np.concatenate(chunks)[:, None])
    for name in ("mean", "std", "min", "max", "q01", "q99"):
        np.testing.assert_allclose(found["action"][name][0], expected[name][0], atol=1e-4)
        np.testing.assert_array_equal(found["action"][name][1:], source.statistics()["action"][name][1:])
    np.testing.assert_array_equal(found["state"]["mean"], source.statistics()["state"]["mean"])


def test_a_batch_has_what_the_policy_sees(dataset):
    module = DataModule(LeRobotSource(dataset), batch_size=4)
    seen = ActionRepresentation([ROT6D, *SEES]).bind(module.spec)
    module.configure(horizon=3, representation=seen)
    batch = next(iter(module.train_dataloader()))
    assert batch.actions.shape == (4, 3, 8)
    rows = batch.extra["rows"]
    np.testing.assert_allclose(
        batch.actions[:, 0, 0], module.source.actions(rows)[:, 0] - module.source.states(rows)[:, 0]
    )
    assert module.action_chunks().shape == (FRAMES, 3, 8)
    assert module.action_chunks()[..., 0].abs().max() < 1


@pytest.mark.parametrize("framework", ["act", "pi0"])
def test_a_trained_policy_gives_the_robots_own_actions(dataset, tmp_path, framework):
    groups = "actions.groups=[{dims: [gripper]}, {dims: [ee_position], frame: relative}, "
    groups += "{dims: [ee_rotation], rotation: euler, to: rot6d, frame: relative}]"
    metrics = fit(
        dataset,
        tmp_path,
        groups,
        "trainer.max_steps=2",
        "data.val_fraction=0.25",
        "trainer.val_check_interval=2",
        framework=framework,
    )
    assert np.isfinite(metrics["val/action_error"])
    policy = Policy.from_checkpoint(tmp_path, device="cpu")
    assert [dim.name for dim in policy.spec.action] == [dim.name for dim in ARM.action]
    assert policy.framework.spec.action_dim == 8
    # Hardly trained, the policy gives about the mean of what it saw, which is close to where the arm is.
    state = np.array([7 * FAR, 3.1, 0.1, 0.2], np.float32)
    observation = {
        "images": {"front": np.zeros((32, 32, 3), np.uint8)},
        "state": state,
        "prompt": "go",
        "seed": 1,
    }
    chunk = policy.infer(observation)["actions"]
    assert chunk.shape == (4, 5)
    assert np.abs(chunk[:, 0] - 7 * FAR).max() < 10
    assert np.abs(chunk[:, 1] - 3.1).max() < np.pi
    moved = policy.infer({**observation, "state": state + np.array([500, 0, 0, 0], np.float32)})["actions"]
    assert np.abs(moved[:, 0] - 7 * FAR - 500).max() < 10


def test_deltas_start_at_the_current_step(dataset):
    module = DataModule(LeRobotSource(dataset), batch_size=4)
    seen = ActionRepresentation([{"dims": ["x"], "frame": "delta"}]).bind(module.spec)
    with pytest.raises(LibrobotError, match="this framework's chunks start 1 before it; take frame=relative"):
        module.configure(horizon=4, obs_steps=2, action_offset=-1, representation=seen)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["actions=relative", "actions.groups=[{dims: [grip], frame: relative}]"],
            "actions.groups.0.: action 'grip' .* no state",
        ),
        (
            ["actions.groups=[{dims: [x], fram: delta}]"],
            r"actions .ActionRepresentation.: groups\[0\].fram: did you mean 'frame'",
        ),
        (["actions=rot6d"], "actions.rotation: a value is needed here"),
    ],
)
def test_what_a_user_reads(dataset, tmp_path, overrides, message):
    with pytest.raises(LibrobotError, match=message):
        fit(dataset, tmp_path, *overrides, "trainer.max_steps=1")


def test_a_policy_without_representation_is_as_before(dataset, tmp_path):
    fit(dataset, tmp_path, "trainer.max_steps=1")
    policy = Policy.from_checkpoint(tmp_path, device="cpu")
    assert policy.framework.robots.representation is None
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["librobot"]["spec"]
    assert [dim["name"] for dim in saved["action"]] == [dim.name for dim in ARM.action]
