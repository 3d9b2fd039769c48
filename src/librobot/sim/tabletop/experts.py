"""Scripted experts: each looks at the true scene and gives the next clean action.

An expert has no clock: what it does follows from where things are, so that after a disturbance it corrects
itself, and a policy that imitates it sees a function of the present.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from librobot.sim.base import EnvObservation
from librobot.sim.tabletop import kinematics
from librobot.sim.tabletop.env import MAX_STEP, MAX_TURN, TabletopEnv
from librobot.sim.tabletop.kinematics import Pose
from librobot.sim.tabletop.layout import Kind
from librobot.sim.tabletop.scene import BUTTON_HEIGHT, BUTTON_TRAVEL, CUBE_HALF, RING_CENTRE

TRAVEL_HEIGHT = 0.085  # m, of the tip while it moves above things
GRASP_HEIGHT = 0.014
PUSH_HEIGHT = 0.016
CLOSE_BY = 0.010  # m, horizontal distance under which the tip goes down all the way
RELEASE_WITHIN = 0.020  # m, from the held cube to the disc's centre
PUSH_STEP = (0.012, 0.030)  # m, how far ahead of the contact a push aims: less near the disc
CONTACT = CUBE_HALF + 0.016  # m, from the cube's centre to the tip while it pushes
BEHIND = CUBE_HALF + 0.042  # m, from the cube's centre to where a push begins

Goal = tuple[Float[np.ndarray, "3"], float, float]  # tip position, yaw, gripper opening


class TabletopExpert:
    """The expert for whatever the environment's present instruction asks."""

    def __init__(self, env: TabletopEnv) -> None:
        self.env = env
        self._goals = {
            "reach": self._reach, "push": self._push, "press": self._press,
            "drawer": self._drawer, "put": self._put,
        }  # fmt: skip

    def reset(self) -> None:
        self._holds = self._pushing = False

    def __call__(self, observation: EnvObservation) -> Float[np.ndarray, " a"]:
        kind: Kind = self.env.task.kind
        position, yaw, opening = self._goals[kind]()
        now = self.env.pose
        way = position - now.position
        way *= min(1.0, MAX_STEP / max(float(np.linalg.norm(way)), 1e-9))
        turn = np.clip(yaw - now.yaw, -MAX_TURN, MAX_TURN)
        pose = kinematics.clamp(Pose(now.position + way, now.yaw + float(turn)))
        if self.env.action_mode == "joint":
            return np.array([*kinematics.inverse(pose), opening], dtype=np.float32)
        return np.array([*pose.position, pose.yaw, opening], dtype=np.float32)

    def _above(self, place: Float[np.ndarray, "2"], height: float, slope: float = 2.5) -> np.ndarray:
        """A funnel: the tip comes down to `height` as it nears `place`."""
        distance = float(np.linalg.norm(self.env.pose.position[:2] - place))
        rise = np.clip(slope * (distance - CLOSE_BY), 0, max(TRAVEL_HEIGHT - height, 0.0))
        return np.array([*place, height + rise])

    def _reach(self) -> Goal:
        cube = self.env.position(self.env.subject)
        return self._above(cube[:2], 2 * CUBE_HALF + 0.01), 0.0, 0.5

    def _press(self) -> Goal:
        button = self.env.position(self.env.subject)
        return self._above(button[:2], BUTTON_HEIGHT - BUTTON_TRAVEL - 0.006), 0.0, 0.0

    def _drawer(self) -> Goal:
        """Down into the handle's ring with the gripper closed, then along the drawer's axis."""
        env = self.env
        base, yaw = env.position("drawer")[:2], env.yaw("drawer")
        axis = np.array([np.cos(yaw), np.sin(yaw)])
        ring = env.position("drawer_front")[:2] + axis * RING_CENTRE
        tip = env.pose.position
        turned = _wrap_half_turn(yaw)
        if tip[2] < 0.030 and np.linalg.norm(tip[:2] - ring) < 0.032:
            sign = 1.0 if env.task.subject == "open" else -1.0
            on_axis = base + axis * float((tip[:2] - base) @ axis)
            return np.array([*(on_axis + sign * 0.03 * axis), 0.014]), turned, 0.0
        return self._above(ring, 0.014), turned, 0.0

    def _put(self) -> Goal:
        env = self.env
        cube, disc = env.position(env.subject), env.position(f"disc_{env.task.target}")
        tip, yaw = env.pose.position, _wrap_quarter_turn(env.yaw(env.subject))
        at_cube = float(np.linalg.norm(tip[:2] - cube[:2])) < 0.014 and tip[2] < cube[2] + 0.004
        at_goal = float(np.linalg.norm(cube[:2] - disc[:2])) < RELEASE_WITHIN
        if at_goal and cube[2] < CUBE_HALF + 0.014:
            self._holds = False
            return np.array([*tip[:2], tip[2] + (0.03 if env.opening > 0.75 else 0.0)]), env.pose.yaw, 1.0
        closed_on_cube = at_cube and env.opening < 0.62
        if closed_on_cube and not self._holds:
            self._holds = self._settled()
            return np.array([*tip[:2], GRASP_HEIGHT]), env.pose.yaw, 0.2
        self._holds = self._holds and at_cube
        if not self._holds:
            down = self._above(cube[:2], GRASP_HEIGHT)
            return down, yaw, 0.2 if at_cube else 1.0
        distance = float(np.linalg.norm(cube[:2] - disc[:2]))
        grasp = tip - cube
        height = GRASP_HEIGHT + np.clip(2.5 * (distance - RELEASE_WITHIN), 0.0, 0.06)
        if distance > 0.04 and tip[2] < GRASP_HEIGHT + 0.025:  # up before across
            return np.array([*tip[:2], GRASP_HEIGHT + 0.045]), env.pose.yaw, 0.2
        return np.array([*(disc[:2] + grasp[:2]), height]), 0.0, 0.2

    def _settled(self) -> bool:
        """The fingers no longer move: they hold something."""
        return bool(abs(self.env.data.joint("finger_left").qvel[0]) < 0.004)

    def _push(self) -> Goal:
        """Behind the cube with the fingers across the way, then forward; back again where it slips."""
        env = self.env
        cube, disc = env.position(env.subject)[:2], env.position(f"disc_{env.task.target}")[:2]
        tip = env.pose.position
        way = disc - cube
        distance = float(np.linalg.norm(way))
        direction = way / max(distance, 1e-6)
        yaw = _wrap_half_turn(float(np.arctan2(direction[1], direction[0])))
        offset = tip[:2] - cube
        along, across = (
            float(offset @ direction),
            float(abs(offset @ np.array([-direction[1], direction[0]]))),
        )
        low = tip[2] < PUSH_HEIGHT + 0.014
        if self._pushing:
            self._pushing = low and along < -0.015 and across < 0.022
        elif low and along < -0.025 and across < 0.012:
            self._pushing = True
        if distance < 0.012 and low:
            return tip.copy(), env.pose.yaw, 0.35
        if self._pushing:
            ahead = cube + direction * (np.clip(0.5 * distance, *PUSH_STEP) - CONTACT)
            return np.array([*ahead, PUSH_HEIGHT]), yaw, 0.35
        return self._above(cube - direction * BEHIND, PUSH_HEIGHT), yaw, 0.35


def _wrap_half_turn(angle: float) -> float:
    """The same finger line within (-90, 90] degrees: a parallel gripper looks the same half a turn on."""
    return float((angle + np.pi / 2) % np.pi - np.pi / 2)


def _wrap_quarter_turn(angle: float) -> float:
    """The nearest of a cube's four equal grasps, within (-45, 45] degrees."""
    return float((angle + np.pi / 4) % (np.pi / 2) - np.pi / 4)
