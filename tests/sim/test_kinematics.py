"""The arm's closed-form kinematics, against themselves and against MuJoCo's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from librobot.sim.tabletop import kinematics
from librobot.sim.tabletop.kinematics import Pose


def reachable(radius: float, angle: float, height: float, yaw: float) -> Pose:
    return Pose(np.array([radius * np.cos(angle), radius * np.sin(angle), height]), yaw)


@given(
    radius=st.floats(kinematics.MIN_RADIUS, kinematics.MAX_RADIUS),
    angle=st.floats(-1.2, 1.2),
    height=st.floats(kinematics.MIN_HEIGHT, 0.10),
    yaw=st.floats(-kinematics.MAX_YAW, kinematics.MAX_YAW),
)
def test_forward_undoes_inverse(radius: float, angle: float, height: float, yaw: float) -> None:
    pose = reachable(radius, angle, height, yaw)
    again = kinematics.forward(kinematics.inverse(pose))
    np.testing.assert_allclose(again.position, pose.position, atol=1e-9)
    assert again.yaw == pytest.approx(yaw, abs=1e-9)


@given(x=st.floats(-1, 1), y=st.floats(-1, 1), z=st.floats(-1, 1), yaw=st.floats(-9, 9))
def test_clamp_gives_a_pose_that_the_arm_takes(x: float, y: float, z: float, yaw: float) -> None:
    pose = kinematics.clamp(Pose(np.array([x, y, z]), yaw))
    again = kinematics.forward(kinematics.inverse(pose))
    np.testing.assert_allclose(again.position, pose.position, atol=1e-9)
    assert abs(pose.yaw) <= kinematics.MAX_YAW


def test_agrees_with_the_simulated_arm() -> None:
    import mujoco

    from librobot.sim.tabletop.scene import JOINTS, scene_xml

    model = mujoco.MjModel.from_xml_string(scene_xml())
    data = mujoco.MjData(model)
    generator = np.random.default_rng(0)
    for _ in range(20):
        pose = reachable(*generator.uniform([0.15, -0.8, 0.02, -1], [0.40, 0.8, 0.15, 1]))
        for name, angle in zip(JOINTS, kinematics.inverse(pose), strict=True):
            data.joint(name).qpos[:] = angle
        mujoco.mj_forward(model, data)
        np.testing.assert_allclose(data.site("tip").xpos, pose.position, atol=1e-9)
        fingers = data.body("finger_left").xpos - data.body("finger_right").xpos
        along = np.array([-np.sin(pose.yaw), np.cos(pose.yaw), 0])  # the y axis, turned by yaw
        np.testing.assert_allclose(fingers / np.linalg.norm(fingers), along, atol=1e-9)
