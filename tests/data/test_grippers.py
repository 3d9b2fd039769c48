"""What check says of grippers and of pictures that come twice, of numbers made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from librobot.data.check import check
from librobot.data.grippers import gripper_problems
from librobot.data.sources.synthetic import synthetic
from librobot.types import Dim

OWNER = np.repeat(np.arange(4), 20)
STEPS = (np.tile(np.arange(20), 4) % 10 < 5).astype(np.float32)[:, None]


def problems(state, action, *, state_dim=None, action_dim=None, owner=OWNER):
    grip = Dim("grip", kind="gripper")
    return list(gripper_problems(state, action, ((state_dim or grip,), (action_dim or grip,)), owner))


def after(action: np.ndarray) -> np.ndarray:
    """The state that follows each action."""
    return np.concatenate([action[:1], action[:-1]])


def test_a_good_gripper():
    assert problems(after(STEPS), STEPS) == []
    assert problems(after(STEPS), 2 * STEPS - 1) == []


def test_out_of_range():
    action = STEPS.copy()
    action[7] = 3
    (where, what, _), *_ = problems(after(STEPS), action)
    assert (where, what) == ("action 'grip'", "goes from 0 to 3, expected values in [0, 1]")
    limited = Dim("grip", kind="gripper", low=0, high=0.5)
    what = problems(after(STEPS), STEPS, action_dim=limited)[0][1]
    assert what == "goes from 0 to 1, expected values in [0, 0.5]"
    assert problems(after(STEPS) * 90, STEPS * 90) == []  # a convention of its own
    assert problems(after(STEPS), action, action_dim=Dim("grip")) == []


def test_inverted():
    state = after(STEPS)
    state[OWNER == 2] = 1 - state[OWNER == 2]
    (where, what, episodes), *rest = problems(state, STEPS)
    assert (where, episodes, rest) == ("action 'grip', episode 2", (2,), [])
    assert "opens when state 'grip' closes, in 1 of the 4 episodes" in what


def test_at_rest():
    action = STEPS.copy()
    action[OWNER == 1] = 1
    (where, what, episodes), *rest = problems(after(action), action)
    assert (where, what, episodes) == ("action 'grip', episode 1", "never moves, as in 1 of 4 episodes", (1,))
    assert rest == []
    action[OWNER >= 1] = 1  # where most are at rest, it is the task
    assert problems(after(action), action) == []


@pytest.fixture
def source():
    return synthetic(episodes=3, length=(30, 30), state_dim=3, action_dim=3, height=16, width=16)


def test_made_up_episodes_have_no_problem(source):
    assert [f for f in check(source, show=False) if f.kind in ("gripper", "repeated", "jump")] == []


def test_dropped_frames(source):
    frames = source.images

    def dropping(rows):
        """Frames 14 and 15 of episode 1 show what frame 13 does, in one camera."""
        stuck = np.where((rows >= 44) & (rows <= 45), 43, rows)
        return {"front": frames(stuck)["front"], "wrist": frames(rows)["wrist"]}

    source.images = dropping
    found = [f for f in check(source, show=False) if f.kind == "repeated"]
    assert [(f.where, f.episodes) for f in found] == [("camera front, episode 1, frame 14", (1,))]
    assert "while the robot moves (2 of 7 frames looked at)" in found[0].what
    still = source.states
    source.states = lambda rows: np.where((np.asarray(rows)[:, None] // 30) == 1, 0.5, still(rows))
    assert [f for f in check(source, show=False) if f.kind == "repeated"] == []
