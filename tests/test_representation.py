"""What a policy sees of a robot's actions: numbers by hand, the way back, and what does not fit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from librobot.representation import ActionRepresentation, Representation, relative_pose, rotations_as
from librobot.rotations import to_matrix
from librobot.types import Dim, RobotSpec

JOINTS = RobotSpec(
    name="arm",
    cameras=(),
    state=(Dim("grip", kind="gripper"), Dim("j1", "rad", "joint"), Dim("j0", "rad", "joint")),
    action=(
        Dim("j0", "rad", "joint", low=-3, high=3),
        Dim("j1", "rad", "joint"),
        Dim("grip", kind="gripper"),
    ),
    control_hz=10,
)
POSE = [Dim(name, "m", "ee_position") for name in "xyz"]
ANGLES = [Dim(name, "rad", "ee_rotation") for name in ("roll", "pitch", "yaw")]
GRIP = Dim("gripper", kind="gripper")
EE = RobotSpec(name="ee", cameras=(), state=(*POSE, *ANGLES), action=(*POSE, *ANGLES, GRIP), control_hz=10)
RELATIVE = [{"dims": ["gripper"], "frame": "absolute"}, {"dims": ["*"], "frame": "relative"}]
DELTA = [{"dims": ["gripper"], "frame": "absolute"}, {"dims": ["*"], "frame": "delta"}]


def bound(groups, robot: RobotSpec = JOINTS) -> Representation:
    return ActionRepresentation(groups).bind(robot)


def test_relative_chunks():
    seen = bound(RELATIVE)
    actions = torch.tensor([[[1.0, 2.0, 0.5], [3.0, 5.0, 1.0]]])
    state = torch.tensor([[9.0, 10.0, 100.0]])
    expected = torch.tensor([[[-99.0, -8.0, 0.5], [-97.0, -5.0, 1.0]]])
    assert torch.equal(seen.encode(actions, state), expected)
    assert torch.equal(seen.decode(expected, state), actions)
    assert seen.spec.action == (
        Dim("j0", "rad", "joint", "delta"),
        Dim("j1", "rad", "joint", "delta"),
        JOINTS.action[2],
    )
    assert (seen.robot, seen.spec.state, seen.changes, seen.sees_deltas) == (
        JOINTS,
        JOINTS.state,
        True,
        False,
    )
    assert seen.untouched(0) == [(2, 2)]


def test_deltas():
    seen = bound(DELTA)
    actions = torch.tensor([[[1.0, 2.0, 0.5], [3.0, 5.0, 1.0]]])
    state = torch.tensor([[9.0, 10.0, 100.0]])
    expected = torch.tensor([[[-99.0, -8.0, 0.5], [2.0, 3.0, 1.0]]])
    assert torch.equal(seen.encode(actions, state), expected)
    assert torch.equal(seen.decode(expected, state), actions)
    assert seen.sees_deltas


def test_nothing_to_do():
    assert not bound([]).changes
    assert not bound([{"dims": ["*"], "frame": "absolute"}]).changes
    changes = RobotSpec("d", (), (), (Dim("x", mode="delta"), Dim("y", mode="delta")), 5)
    assert not bound(RELATIVE, changes).changes  # they are changes already
    with pytest.raises(
        ValueError, match=r"groups\[0\]: action 'x' is a change already, it cannot be relative"
    ):
        bound([{"dims": ["x"], "frame": "relative"}], changes)


def test_grippers():
    seen = bound([{"dims": ["gripper"], "closed": [0.0, 1.0], "open": [0.04, -1.0]}])
    actions = torch.tensor([[[1.0, 2.0, 0.04], [1.0, 2.0, 0.0], [1.0, 2.0, 0.01]]])
    found = seen.encode(actions, torch.zeros(1, 3))
    torch.testing.assert_close(found[0, :, 2], torch.tensor([-1.0, 1.0, 0.5]))
    torch.testing.assert_close(seen.decode(found, torch.zeros(1, 3)), actions)


def trajectory(steps: int, samples: int, seed: int, *, turning: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks of poses and the pose before them; rotations turn by about `turning` in every step."""
    random = np.random.default_rng(seed)
    rotation = Rotation.random(samples, random_state=seed)
    angles, places = [rotation.as_euler("xyz")], [random.normal(size=(samples, 3))]
    for _ in range(steps):
        rotation = rotation * Rotation.from_rotvec(random.normal(scale=turning, size=(samples, 3)))
        angles.append(rotation.as_euler("xyz"))
        places.append(places[-1] + random.normal(scale=0.1, size=(samples, 3)))
    poses = np.concatenate([np.stack(places, 1), np.stack(angles, 1)], axis=-1)
    grip = random.uniform(size=(samples, steps, 1))
    actions = np.concatenate([poses[:, 1:], grip], axis=-1)
    return torch.from_numpy(actions), torch.from_numpy(poses[:, 0])


def matrices(angles: torch.Tensor) -> torch.Tensor:
    flat = Rotation.from_euler("xyz", angles.reshape(-1, 3).numpy()).as_matrix()
    return torch.from_numpy(flat).view(*angles.shape[:-1], 3, 3)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["absolute", "relative", "delta"]),
    st.sampled_from(["rot6d", "quaternion", "axis_angle", "euler", None]),
    st.sampled_from(["absolute", "relative", "delta"]),
    st.integers(0, 10_000),
)
def test_every_representation_comes_back(frame, to, position, seed):
    groups = [
        {"dims": ["ee_rotation"], "rotation": "euler", "to": to, "frame": frame},
        {"dims": ["gripper"]},
        {"dims": ["ee_position"], "frame": position},
    ]
    seen = bound(groups, EE)
    actions, state = trajectory(6, 4, seed, turning=0.3)
    found = seen.encode(actions, state)
    assert found.shape == (4, 6, seen.spec.action_dim)
    back = seen.decode(found, state)
    torch.testing.assert_close(back[..., [0, 1, 2, 6]], actions[..., [0, 1, 2, 6]])
    assert (matrices(back[..., 3:6]) - matrices(actions[..., 3:6])).abs().max() < 1e-5


def test_rotations_are_relative_as_rotations():
    seen = rotations_as("rot6d", rotation="euler", dims=["ee_rotation"], frame="relative").bind(EE)
    actions, state = trajectory(3, 2, 0, turning=1.0)
    found = seen.encode(actions, state)
    there, here = (Rotation.from_euler("xyz", x.numpy()) for x in (actions[1, 2, 3:6], state[1, 3:]))
    expected = (here.inv() * there).as_matrix()[:2].reshape(6)
    torch.testing.assert_close(found[1, 2, 3:9], torch.from_numpy(expected))
    assert [dim.name for dim in seen.spec.action] == [
        "x",
        "y",
        "z",
        *[f"roll.rot6d_{i}" for i in range(6)],
        "gripper",
    ]
    assert seen.untouched(0) == [(0, 0), (1, 1), (2, 2), (9, 6)]


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["relative", "delta"]),
    st.sampled_from(["rot6d", "quaternion", "axis_angle", "euler"]),
    st.integers(0, 10_000),
)
def test_poses_are_relative_as_rigid_motions(frame, to, seed):
    """T_start^-1 T_action, by homogeneous matrices; and back."""
    dims = ["ee_position", "ee_rotation"]
    seen = relative_pose("euler", to=to, dims=dims, frame=frame).bind(EE)
    actions, state = trajectory(5, 3, seed, turning=0.3)
    found = seen.encode(actions, state)
    poses = torch.cat((state[:, None], actions[..., :6]), dim=1)
    homogeneous = torch.eye(4, dtype=torch.float64).repeat(3, 6, 1, 1)
    homogeneous[..., :3, :3], homogeneous[..., :3, 3] = matrices(poses[..., 3:]), poses[..., :3]
    start = homogeneous[:, :1] if frame == "relative" else homogeneous[:, :-1]
    expected = torch.linalg.inv(start) @ homogeneous[:, 1:]
    torch.testing.assert_close(found[..., :3], expected[..., :3, 3])
    turned = to_matrix(found[..., 3:-1], to)
    torch.testing.assert_close(turned, expected[..., :3, :3], atol=1e-6, rtol=0)
    assert torch.equal(found[..., -1], actions[..., -1])
    back = seen.decode(found, state)
    torch.testing.assert_close(back[..., [0, 1, 2, 6]], actions[..., [0, 1, 2, 6]], atol=1e-6, rtol=0)
    assert (matrices(back[..., 3:6]) - matrices(actions[..., 3:6])).abs().max() < 1e-5
    assert [dim.name for dim in seen.spec.action[:4]] == ["x", "y", "z", f"roll.{to}_0"]


def test_angles_come_back_next_to_the_state():
    """A gripper that points down has a roll of pi: its angles must not jump to -pi and back."""
    seen = rotations_as("rot6d", rotation="euler", dims=["ee_rotation"]).bind(EE)
    roll = torch.tensor([3.10, 3.16, 3.20, 3.13], dtype=torch.float64)
    actions = torch.zeros(1, 4, 7, dtype=torch.float64)
    actions[..., 3] = roll
    state = torch.tensor([[0, 0, 0, 3.12, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(seen.decode(seen.encode(actions, state), state), actions, atol=1e-6, rtol=0)
    other = state.clone()
    other[0, 3] -= 2 * math.pi
    expected = actions.clone()
    expected[..., 3] -= 2 * math.pi
    torch.testing.assert_close(seen.decode(seen.encode(actions, state), other), expected, atol=1e-6, rtol=0)


def test_changes_of_rotation_do_not_look_at_the_state():
    robot = RobotSpec("d", (), tuple(ANGLES), tuple(Dim(d.name, d.unit, d.kind, "delta") for d in ANGLES), 5)
    seen = rotations_as("axis_angle", rotation="euler", dims=["ee_rotation"]).bind(robot)
    actions = torch.full((1, 2, 3), 0.1)
    torch.testing.assert_close(
        seen.decode(seen.encode(actions, torch.full((1, 3), 9.0)), torch.full((1, 3), 9.0)), actions
    )


def test_several_robots():
    narrow = RobotSpec("n", (), (Dim("z"),), (Dim("z"),), 10)
    union = RobotSpec("u", (), EE.state, (*EE.action, Dim("padding_7")), 10)
    groups = [
        {"dims": ["ee_rotation"], "rotation": "euler", "to": "rot6d"},
        {"dims": ["gripper"]},
        {"dims": ["*"], "frame": "relative"},
    ]
    seen = ActionRepresentation(groups).bind(union, [EE, narrow])
    assert seen.embodiments is not None
    assert [robot.action_dim for robot in seen.embodiments] == [10, 1]
    assert seen.spec.action_dim == 11
    actions, state = trajectory(3, 2, 1, turning=0.2)
    actions = torch.cat((actions, torch.zeros(2, 3, 1)), dim=-1)
    actions[1, :, 1:] = 0
    robots = torch.tensor([0, 1])
    found = seen.encode(actions, state, robots)
    torch.testing.assert_close(found[1, :, 0], actions[1, :, 0] - state[1, 0])
    assert not found[1, :, 1:].any()
    assert not found[0, :, 10:].any()
    torch.testing.assert_close(seen.decode(found, state, robots)[1], actions[1])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"dims": ["*"], "fram": "relative"}], r"groups\[0\].fram: did you mean 'frame'"),
        ([{"dims": ["*"], "frame": "relativ"}], r"groups\[0\].frame: did you mean 'relative'"),
        ([{"dims": ["j9"]}], r"groups\[0\].dims: 'j9': .*valid names: grip, j0, j1"),
        ([{"dims": ["j0"], "to": "rot6d"}], r"to=rot6d needs rotation"),
        ([{"dims": ["j0"], "pose": True}], r"pose=true needs rotation, and frame=relative"),
        (
            [{"dims": ["j0", "j1"], "rotation": "euler", "pose": True, "frame": "relative"}],
            r"pose=true has 3 and rotation=euler has 3 numbers, found 2 dim",
        ),
        (
            [{"dims": ["j0"], "rotation": "euler", "to": "rot6d"}],
            r"rotation=euler has 3 numbers, found 1 dim",
        ),
        (
            [{"dims": ["j0"], "frame": "relative", "state": ["q"]}],
            r"action 'j0' of robot 'arm' has no state 'q'",
        ),
        ([{"dims": ["joint"], "frame": "relative", "state": ["j0"]}], r"state: expected 2 names"),
        ([{"dims": ["grip"], "closed": [0, 1]}], r"closed and open go together"),
        ([{"dims": ["grip"], "closed": [1, 0], "open": [1, 1]}], r"two different numbers of the robot"),
    ],
)
def test_what_does_not_fit(groups, message):
    with pytest.raises(ValueError, match=message):
        bound(groups)
