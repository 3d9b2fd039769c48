"""GR00T's relative actions: each step of a chunk has statistics of its own, from the data to the policy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import fit

from librobot.data.seen_actions import seen_statistics
from librobot.data.sources.lerobot import LeRobotSource
from librobot.data.writer import LeRobotWriter
from librobot.policy import Policy
from librobot.representation import ActionRepresentation
from librobot.types import Camera, Dim, RobotSpec

ARM = RobotSpec(
    name="arm",
    cameras=(Camera("front", 32, 32),),
    state=(Dim("x", "m", "ee_position"),),
    action=(Dim("x", "m", "ee_position"), Dim("grip", kind="gripper")),
    control_hz=10.0,
)
GROUPS = [{"dims": ["gripper"]}, {"dims": ["*"], "frame": "relative"}]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """x is 0, 1, 2, 3 and wanted at 1, 3, 6, 10: from each state on by 1 3, 2 5, 4 8, and 7 at the end."""
    random = np.random.default_rng(0)
    with LeRobotWriter(tmp_path / "data", ARM, fps=10) as writer:
        for _ in range(2):
            writer.add_episode(
                images={"front": random.integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)},
                state=np.array([[0], [1], [2], [3]], np.float32),
                action=np.array([[1, 0], [3, 1], [6, 0], [10, 1]], np.float32),
                task="go",
            )
    return tmp_path / "data"


def test_by_hand(dataset):
    source = LeRobotSource(dataset)
    seen = ActionRepresentation(GROUPS).bind(source.spec)
    found = seen_statistics(source, seen, {"horizon": 6, "obs_steps": 1})
    steps = found["action_by_step"]
    # Four steps are as far as an episode goes: the last chunk of all is 10 - 0.
    assert steps["min"][:, 0].tolist() == [1, 3, 6, 10, 10, 10]
    assert steps["max"][:, 0].tolist() == [7, 8, 9, 10, 10, 10]
    assert steps["mean"][:2, 0].tolist() == [3.5, 16 / 3]
    assert (found["action"]["min"][0], found["action"]["max"][0]) == (1, 10)
    assert steps["min"][:, 1].tolist() == [0] * 6  # the gripper's are the dataset's
    assert steps["max"][:, 1].tolist() == [1] * 6


def test_a_policy_keeps_them(dataset, tmp_path):
    fit(
        dataset,
        tmp_path / "run",
        "actions=relative",
        "framework.horizon=2",
        "framework.normalization={state: min_max, action: min_max}",
        "trainer.max_steps=1",
        "data.batch_size=2",
        framework="groot_n17",
    )
    policy = Policy.from_checkpoint(tmp_path / "run", device="cpu")
    normalizer = policy.framework.normalizer
    torch.testing.assert_close(normalizer.action_offset, torch.tensor([[4.0, 0.5], [5.5, 0.5]]))
    torch.testing.assert_close(normalizer.action_scale, torch.tensor([[3.0, 0.5], [2.5, 0.5]]))
    observation = {"images": {"front": np.zeros((32, 32, 3), np.uint8)}, "prompt": "go", "seed": 1}
    here, there = (
        policy.infer({**observation, "state": np.array([x], np.float32)})["actions"] for x in (3.0, 5000.0)
    )
    # Far outside, the normalised state is clipped to 1, which 3 is: the chunk is the same, from there on.
    np.testing.assert_allclose(there[:, 0] - 5000, here[:, 0] - 3, atol=1e-3)
    np.testing.assert_allclose(there[:, 1], here[:, 1], atol=1e-5)
