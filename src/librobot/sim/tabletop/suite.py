"""The embedded suite, as the `env=tabletop` group builds it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import gymnasium
import numpy as np

from librobot.errors import LibrobotError, nearest
from librobot.sim.base import Expert
from librobot.sim.render import Backend
from librobot.sim.tabletop import kinematics
from librobot.sim.tabletop.env import CONTROL_HZ, TabletopEnv
from librobot.sim.tabletop.experts import TabletopExpert
from librobot.sim.tabletop.layout import KINDS, Kind
from librobot.sim.tabletop.scene import JOINTS
from librobot.types import Camera, Dim, RobotSpec

_REACH = kinematics.MAX_RADIUS
_EE = (
    Dim("x", "m", "ee_position", low=-_REACH, high=_REACH),
    Dim("y", "m", "ee_position", low=-_REACH, high=_REACH),
    Dim("z", "m", "ee_position", low=kinematics.MIN_HEIGHT, high=kinematics.MAX_HEIGHT),
    Dim("yaw", "rad", "ee_rotation", low=-kinematics.MAX_YAW, high=kinematics.MAX_YAW),
)
_JOINTS = tuple(Dim(name, "rad", "joint", low=-np.pi, high=np.pi) for name in JOINTS)
_EE_NOISE = (0.012, 0.012, 0.007, 0.10, 0.0)  # m, m, m, rad, opening
_JOINT_NOISE = (0.04, 0.03, 0.03, 0.03, 0.08, 0.0)  # rad, opening
_GRIPPER = Dim("gripper", "", "gripper", low=0.0, high=1.0)


class TabletopSuite:
    """Five kinds of language-given tasks on a table, with a scripted expert for each.

    Args:
        action: "ee" (tip position, yaw, gripper; 5 dimensions) or "joint" (five angles, gripper; 6).
        kinds: which of reach, push, press, drawer and put.
        image_size: height and width of both cameras' pictures, in pixels.
        renderer: "gl", "rays", or "auto": OpenGL where a context opens, else rays.
    """

    name = "tabletop"

    def __init__(
        self,
        *,
        action: Literal["ee", "joint"] = "ee",
        kinds: Sequence[Kind] = KINDS,
        image_size: int = 64,
        renderer: Backend = "auto",
    ) -> None:
        if action not in ("ee", "joint"):
            raise LibrobotError(f"env.action: {nearest(action, ('ee', 'joint'))}, found {action!r}")
        for kind in kinds:
            if kind not in KINDS:
                raise LibrobotError(f"env.kinds: unknown kind of task {kind!r}; {nearest(kind, KINDS)}")
        if not image_size >= 16:
            raise ValueError(f"env.image_size must be at least 16 pixels, found {image_size}")
        self.action: Literal["ee", "joint"] = action
        self.kinds: tuple[Kind, ...] = tuple(kinds)
        self.image_size = image_size
        self._backend: Backend = renderer
        self.noise_scale = np.array(_EE_NOISE if action == "ee" else _JOINT_NOISE)
        self.spec = RobotSpec(
            name="tabletop",
            cameras=tuple(Camera(name, image_size, image_size) for name in ("front", "wrist")),
            state=(*_JOINTS, _GRIPPER, *_EE),
            action=(*(_EE if action == "ee" else _JOINTS), _GRIPPER),
            control_hz=CONTROL_HZ,
        )

    @cached_property
    def renderer(self) -> str:
        env = self.make()
        env.reset(seed=0)
        name = env._get_renderer().name
        env.close()
        return name

    def make(self) -> TabletopEnv:
        return TabletopEnv(
            action=self.action, kinds=self.kinds, image_size=self.image_size, renderer=self._backend
        )

    def expert(self, env: gymnasium.Env) -> Expert:
        scene = env.unwrapped
        assert isinstance(scene, TabletopEnv), "the expert needs an environment that make() made"
        return TabletopExpert(scene)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "action": self.action,
            "kinds": list(self.kinds),
            "image_size": self.image_size,
            "renderer": self.renderer,
        }
