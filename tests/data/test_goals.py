"""Goal pictures and progress: what a sample knows of its own future."""

import numpy as np
import torch

from librobot.data.windows import WindowDataset, Windows
from librobot.types import Camera, Dim, RobotSpec


class Numbered:
    """Two episodes of 5 and 40 frames, whose pictures hold their own row."""

    spec = RobotSpec("r", (Camera("front", 2, 2),), (), (Dim("a"),), 10.0)
    episode_lengths = np.array([5, 40])
    provenance = None

    def states(self, rows):
        return np.zeros((len(rows), 0), np.float32)

    def actions(self, rows):
        return rows[:, None].astype(np.float32)

    def images(self, rows):
        return {
            "front": np.broadcast_to(rows.astype(np.uint8)[:, None, None, None], (len(rows), 3, 2, 2)).copy()
        }

    def prompts(self, rows):
        return ["go"] * len(rows)

    def statistics(self):
        return {}


def dataset(goal_seed: int | None) -> WindowDataset:
    source = Numbered()
    windows = Windows(source.episode_lengths, [0, 1], horizon=3, obs_steps=1)
    return WindowDataset(source, windows, goal_seed=goal_seed)


def goals_of(made) -> np.ndarray:
    return made.observation.goal_images["front"][:, 0, 0, 0].numpy().astype(int)


def test_goals_are_later_frames_of_the_same_episode():
    made = dataset(0).__getitems__(list(range(45)))
    goals, rows = goals_of(made), np.arange(45)
    ends = np.where(rows < 5, 4, 44)
    assert ((goals > rows) | (rows == ends)).all()
    assert (goals <= ends).all()
    assert goals[4] == 4
    assert goals[44] == 44


def test_goals_are_spread_over_what_is_left_and_are_the_seeds():
    starts = np.array([goals_of(dataset(seed).__getitems__([5]))[0] for seed in range(200)])
    assert starts.min() <= 8
    assert starts.max() >= 42
    assert abs(starts.mean() - 25) < 3
    assert (
        goals_of(dataset(7).__getitems__([5, 9])).tolist()
        == goals_of(dataset(7).__getitems__([5, 9])).tolist()
    )


def test_without_a_seed_there_are_no_goals():
    assert dataset(None).__getitems__([0]).observation.goal_images is None


def test_progress_is_the_share_of_the_episode_at_each_action():
    made = dataset(None).__getitems__([0, 3, 4])
    expected = torch.tensor([[0.0, 0.25, 0.5], [0.75, 1.0, 1.0], [1.0, 1.0, 1.0]])
    torch.testing.assert_close(made.extra["progress"], expected)
