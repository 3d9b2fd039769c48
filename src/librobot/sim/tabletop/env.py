"""The tabletop environment: an arm, a scene drawn from a seed, and one instruction per episode."""

from __future__ import annotations

from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from jaxtyping import Float, UInt8

from librobot.errors import LibrobotError, nearest
from librobot.sim.base import EnvObservation
from librobot.sim.render import Backend, Renderer, make_renderer
from librobot.sim.tabletop import kinematics
from librobot.sim.tabletop.kinematics import Pose
from librobot.sim.tabletop.layout import KINDS, Kind, Layout, draw_layout
from librobot.sim.tabletop.scene import (
    BUTTON_TRAVEL,
    CUBE_HALF,
    DRAWER_TRAVEL,
    GRIPPER_TRAVEL,
    JOINTS,
    PARKED,
    TIMESTEP,
    scene_xml,
)

CONTROL_HZ = 10.0
MAX_STEP = 0.045  # m the tip can travel in one action
MAX_TURN = np.deg2rad(30)  # rad the hand can turn in one action
HOME = Pose(np.array([0.24, 0.0, 0.14]), 0.0)
STEP_LIMITS: dict[Kind, int] = {"reach": 35, "push": 60, "press": 40, "drawer": 45, "put": 70}
PROMPT_CHARACTERS = "abcdefghijklmnopqrstuvwxyz "
VIDEO_SIZE = (240, 320)

HOLD_STEPS = 3  # the goal must hold for so many steps in a row: passing by does not count
REACHED = 0.025  # m from the tip to the point 1 cm above the cube
ON_DISC = 0.040  # m from the cube's centre to the disc's: most of the cube stands on it
LIFTED = CUBE_HALF + 0.015  # m of a cube's centre above the table


class TabletopEnv(gymnasium.Env):
    """Five kinds of instruction on a table of coloured things, at 10 actions a second.

    `action="ee"`: the tip's target position x, y, z (m, base frame), the hand's yaw (rad) and the gripper
    (0 closed, 1 open); `action="joint"`: five joint targets (rad) and the gripper. Targets beyond what the
    arm can do in one step are approached as far as it can.

    The state is the arm's own: five joint angles (rad), gripper opening (0 to 1), tip position (m), yaw.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": int(CONTROL_HZ)}  # noqa: RUF012

    def __init__(
        self,
        *,
        action: Literal["ee", "joint"] = "ee",
        kinds: tuple[Kind, ...] = KINDS,
        image_size: int = 64,
        renderer: Backend = "auto",
    ) -> None:
        import mujoco

        self.action_mode = action
        self.kinds = kinds
        self.image_size = image_size
        self.model = mujoco.MjModel.from_xml_string(scene_xml())
        self.data = mujoco.MjData(self.model)
        self._backend: Backend = renderer
        self._renderer: Renderer | None = None
        self.layout: Layout | None = None
        image = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        size = 5 if action == "ee" else 6
        self.action_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.observation_space = spaces.Dict(
            {
                "images": spaces.Dict({"front": image, "wrist": image}),
                "state": spaces.Box(-np.inf, np.inf, (10,), np.float32),
                "prompt": spaces.Text(80, charset=PROMPT_CHARACTERS),
            }
        )
        self.render_mode = "rgb_array"

    # gymnasium's interface

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[EnvObservation, dict[str, Any]]:
        super().reset(seed=seed)
        kind = (options or {}).get("kind") or self.kinds[self.np_random.integers(len(self.kinds))]
        if kind not in self.kinds:
            raise LibrobotError(f"tabletop: unknown kind of task {kind!r}; {nearest(kind, self.kinds)}")
        self.layout = draw_layout(kind, self.np_random)
        self._place(self.layout)
        self._steps = self._good_steps = 0
        self._was_lifted = False
        return self.observe(), {"kind": kind, "success": False}

    def step(
        self, action: Float[np.ndarray, " a"]
    ) -> tuple[EnvObservation, float, bool, bool, dict[str, Any]]:
        action = np.asarray(action, dtype=np.float64)
        expected = (5,) if self.action_mode == "ee" else (6,)
        if action.shape != expected or not np.isfinite(action).all():
            raise LibrobotError(
                f"tabletop: an action must be {expected[0]} finite numbers "
                f"(env.action={self.action_mode}), found shape {action.shape}: {action}"
            )
        self._execute(action)
        self._steps += 1
        kind = self.task.kind
        self._was_lifted |= kind in ("push", "put") and self.position(self.subject)[2] > LIFTED
        self._good_steps = self._good_steps + 1 if self._goal_holds() else 0
        success = self._good_steps >= HOLD_STEPS
        truncated = not success and self._steps >= STEP_LIMITS[kind]
        return self.observe(), float(success), success, truncated, {"kind": kind, "success": success}

    def render(self) -> UInt8[np.ndarray, "h w 3"]:
        return self._get_renderer().render(self.data, "video", *VIDEO_SIZE)

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    # what experts and tests may look at

    @property
    def task(self):
        assert self.layout is not None, "call reset first"
        return self.layout.task

    @property
    def subject(self) -> str:
        """The body that the instruction is about."""
        return {"press": f"button_{self.task.subject}", "drawer": "drawer"}.get(
            self.task.kind, f"cube_{self.task.subject}"
        )

    @property
    def pose(self) -> Pose:
        """The hand's present pose, from the joint angles."""
        return kinematics.forward(self.joints)

    @property
    def joints(self) -> Float[np.ndarray, "5"]:
        return np.array([self.data.joint(name).qpos[0] for name in JOINTS])

    @property
    def opening(self) -> float:
        """The gripper's opening, 0 closed to 1 open."""
        return float(self.data.joint("finger_left").qpos[0] / GRIPPER_TRAVEL)

    def position(self, body: str) -> Float[np.ndarray, "3"]:
        """A body's place in m."""
        return self.data.body(body).xpos.copy()

    def yaw(self, body: str) -> float:
        """A body's turn about the vertical in rad."""
        w, x, y, z = self.data.body(body).xquat
        return float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))

    @property
    def drawer_opening(self) -> float:
        """0 closed to 1 open."""
        return float(self.data.joint("drawer").qpos[0] / DRAWER_TRAVEL)

    def observe(self) -> EnvObservation:
        renderer, size = self._get_renderer(), self.image_size
        images = {name: renderer.render(self.data, name, size, size) for name in ("front", "wrist")}
        pose = self.pose
        state = np.concatenate([self.joints, [self.opening], pose.position, [pose.yaw]])
        return {"images": images, "state": state.astype(np.float32), "prompt": self.task.prompt}

    # inside

    def _get_renderer(self) -> Renderer:
        if self._renderer is None:
            height, width = max(self.image_size, VIDEO_SIZE[0]), max(self.image_size, VIDEO_SIZE[1])
            self._renderer = make_renderer(self.model, height, width, self._backend)
        return self._renderer

    def _place(self, layout: Layout) -> None:
        """Set every object's place, park the rest, and put the arm at home."""
        import mujoco

        mujoco.mj_resetData(self.model, self.data)
        movable = [b for b in range(1, self.model.nbody) if self.model.body_parentid[b] == 0]
        for number, body in enumerate(self.model.body(b) for b in movable):
            if body.name == "base":
                continue
            place = layout.places.get(body.name, np.array([PARKED, number]))
            half = layout.yaws.get(body.name, 0.0) / 2
            turn = np.array([np.cos(half), 0, 0, np.sin(half)])
            if body.name.startswith("cube"):
                self.data.joint(body.name).qpos[:] = [*place, CUBE_HALF, *turn]
            else:
                self.model.body_pos[body.id] = [*place, 0.0]
                self.model.body_quat[body.id] = turn
        self.data.joint("drawer").qpos[:] = layout.drawer_opening
        start = self.np_random.uniform([-0.03, -0.06, -0.02], [0.03, 0.06, 0.02])
        joints = kinematics.inverse(kinematics.clamp(Pose(HOME.position + start, 0.0)))
        for name, angle in zip(JOINTS, joints, strict=True):
            self.data.joint(name).qpos[:] = angle
        for finger in ("finger_left", "finger_right"):
            self.data.joint(finger).qpos[:] = 0.5 * GRIPPER_TRAVEL
        self.data.ctrl[:] = [*joints, 0.5 * GRIPPER_TRAVEL]
        mujoco.mj_forward(self.model, self.data)

    def _execute(self, action: Float[np.ndarray, " a"]) -> None:
        """Move the joint targets along a straight line for one control period."""
        import mujoco

        before = self.data.ctrl[:5].copy()
        if self.action_mode == "ee":
            now = kinematics.forward(before)
            target = kinematics.clamp(Pose(action[:3], action[3]))
            way = target.position - now.position
            way *= min(1.0, MAX_STEP / max(float(np.linalg.norm(way)), 1e-9))
            turn = np.clip(target.yaw - now.yaw, -MAX_TURN, MAX_TURN)
            after = kinematics.inverse(kinematics.clamp(Pose(now.position + way, now.yaw + turn)))
        else:
            low, high = self.model.jnt_range[self._joint_ids()].T
            after = np.clip(action[:5], low, high)
            after = before + np.clip(after - before, -0.5, 0.5)
        self.data.ctrl[5] = np.clip(action[-1], 0, 1) * GRIPPER_TRAVEL
        substeps = round(1 / (CONTROL_HZ * TIMESTEP))
        for i in range(1, substeps + 1):
            self.data.ctrl[:5] = before + (after - before) * min(1.0, 1.25 * i / substeps)
            mujoco.mj_step(self.model, self.data)
        mujoco.mj_forward(self.model, self.data)

    def _joint_ids(self) -> list[int]:
        return [self.model.joint(name).id for name in JOINTS]

    def _goal_holds(self) -> bool:
        task, tip = self.task, self.pose.position
        if task.kind == "reach":
            above = self.position(self.subject) + np.array([0, 0, CUBE_HALF + 0.01])
            return float(np.linalg.norm(tip - above)) < REACHED
        if task.kind == "press":
            return float(self.data.joint(self.subject).qpos[0]) > 0.6 * BUTTON_TRAVEL
        if task.kind == "drawer":
            return self.drawer_opening > 0.9 if task.subject == "open" else self.drawer_opening < 0.1
        cube, disc = self.position(self.subject), self.position(f"disc_{task.target}")
        on_disc = np.linalg.norm(cube[:2] - disc[:2]) < ON_DISC and cube[2] < CUBE_HALF + 0.008
        if task.kind == "push":
            return bool(on_disc and not self._was_lifted)
        return bool(on_disc and self._was_lifted and self.opening > 0.7)
