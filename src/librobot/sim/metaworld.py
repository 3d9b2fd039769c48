"""Meta-World v3 (Yu et al. 2019) behind the suite seam: 50 tasks of a Sawyer arm, one sentence each.

The policy sees two pictures, the hand's position and the gripper's opening: never the objects' positions,
which only the scripted experts read. Meta-World's `marked place` is a coloured site; ray casting draws
geoms only, so the tasks that need the mark (reach, push, pick-place and their kin) need OpenGL.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from jaxtyping import Float, UInt8

from librobot.errors import LibrobotError, nearest, require
from librobot.sim.base import EnvObservation
from librobot.sim.metaworld_tasks import SENTENCES
from librobot.sim.render import RAYS, Backend, Renderer, make_renderer
from librobot.types import Camera, Dim, RobotSpec

MAX_STEPS = 500  # Meta-World refuses to step further
CONTROL_HZ = 80.0  # 5 physics steps of 2.5 ms
KEPT_TASKS = 4  # compiled scenes that an environment keeps: each costs tens of MB and half a second
VIDEO_SIZE = 320  # of render(), in pixels
CAMERAS = {"front": "corner", "wrist": "gripperPOV"}
CHARACTERS = "abcdefghijklmnopqrstuvwxyz' "

STATE = (
    Dim("hand_x", "m", "ee_position", low=-0.525, high=0.525),
    Dim("hand_y", "m", "ee_position", low=0.348, high=1.025),
    Dim("hand_z", "m", "ee_position", low=-0.0525, high=0.7),
    Dim("gripper_opening", "", "gripper", low=0.0, high=1.0),
)
ACTION = (
    Dim("hand_dx", "cm", "ee_position", "delta", -1.0, 1.0),
    Dim("hand_dy", "cm", "ee_position", "delta", -1.0, 1.0),
    Dim("hand_dz", "cm", "ee_position", "delta", -1.0, 1.0),
    Dim("gripper_effort", "", "gripper", low=-1.0, high=1.0),
)

log = logging.getLogger(__name__)


class MetaWorldSuite:
    """Meta-World as a suite (extra `sim`). A kind is a task's name without its version: "drawer-open".

    Args:
        kinds: which tasks; None means all 50.
        image_size: height and width of the cameras' pictures, in pixels.
        cameras: our camera names to the scene's (corner, corner2, corner3, topview, gripperPOV,
            behindGripper); the first one's view is also that of `render()`.
        max_steps: the step limit, at most 500, at 80 steps a second.
        renderer: "gl", "rays", or "auto": OpenGL where a context opens, else rays.
    """

    name = "metaworld"

    # 3 mm of the hand's way a step, none on the gripper: of 50 experts, 49 still succeed.
    noise_scale = np.array([0.3, 0.3, 0.3, 0.0])

    def __init__(
        self,
        *,
        kinds: Sequence[str] | None = None,
        image_size: int = 96,
        cameras: Mapping[str, str] = CAMERAS,
        max_steps: int = MAX_STEPS,
        renderer: Backend = "auto",
    ) -> None:
        self.kinds: tuple[str, ...] = tuple(SENTENCES) if kinds is None else tuple(kinds)
        for kind in self.kinds:
            if kind not in SENTENCES:
                raise LibrobotError(f"env.kinds: Meta-World has no task {kind!r}; {nearest(kind, SENTENCES)}")
        if not self.kinds or not cameras:
            raise ValueError("kinds and cameras must name at least one each")
        if image_size < 1:
            raise ValueError(f"env.image_size must be above 0 pixels, found {image_size}")
        if not 1 <= max_steps <= MAX_STEPS:
            raise ValueError(f"env.max_steps must be between 1 and {MAX_STEPS}, found {max_steps}")
        self.image_size, self.cameras, self.max_steps = image_size, dict(cameras), max_steps
        self.backend: Backend = renderer
        self.spec = RobotSpec(
            name="sawyer",
            cameras=tuple(Camera(name, image_size, image_size) for name in self.cameras),
            state=STATE,
            action=ACTION,
            control_hz=CONTROL_HZ,
        )

    @property
    def renderer(self) -> str:
        return _backend_here(self.backend)

    def make(self) -> MetaWorldEnv:
        return MetaWorldEnv(self)

    def expert(self, env: gymnasium.Env) -> MetaWorldExpert:
        scene = env.unwrapped
        assert isinstance(scene, MetaWorldEnv), "the expert needs an environment that make() made"
        return MetaWorldExpert(scene)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kinds": list(self.kinds),
            "image_size": self.image_size,
            "cameras": dict(self.cameras),
            "max_steps": self.max_steps,
            "renderer": self.renderer,
        }


class MetaWorldEnv(gymnasium.Env):
    """Any of the suite's tasks: `reset(options={"kind": name})` chooses which."""

    render_mode = "rgb_array"

    def __init__(self, suite: MetaWorldSuite) -> None:
        require("metaworld", "sim")
        self.suite = suite
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}
        spec = suite.spec
        self.action_box, self.state_box = _box(spec.action), _box(spec.state)
        self.action_space = self.action_box
        image = spaces.Box(0, 255, (suite.image_size, suite.image_size, 3), np.uint8)
        self.observation_space = spaces.Dict(
            images=spaces.Dict(dict.fromkeys(suite.cameras, image)),
            state=self.state_box,
            prompt=spaces.Text(max_length=120, charset=CHARACTERS),
        )
        self._scenes: OrderedDict[str, _Scene] = OrderedDict()
        self.kind = suite.kinds[0]
        self.steps = 0
        self.full_observation = np.zeros(39)  # Meta-World's own, with the objects: for the expert only

    @property
    def scene(self) -> _Scene:
        """The compiled scene of the current kind; the least recently used one makes room for it."""
        if self.kind not in self._scenes:
            self._scenes[self.kind] = _Scene(self.kind, self.suite)
            if len(self._scenes) > KEPT_TASKS:
                self._scenes.popitem(last=False)[1].close()
        self._scenes.move_to_end(self.kind)
        return self._scenes[self.kind]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[EnvObservation, dict[str, Any]]:
        super().reset(seed=seed)
        kind = (options or {}).get("kind") or str(self.np_random.choice(self.suite.kinds))
        if kind not in self.suite.kinds:
            raise LibrobotError(
                f"this Meta-World suite has no kind {kind!r}; {nearest(kind, self.suite.kinds)}"
            )
        self.kind, self.steps = kind, 0
        scene_seed = seed if seed is not None else int(self.np_random.integers(2**31))
        self.full_observation = self.scene.reset(scene_seed)
        return self._observation(), {"kind": kind, "success": False}

    def step(
        self, action: Float[np.ndarray, " a"]
    ) -> tuple[EnvObservation, float, bool, bool, dict[str, Any]]:
        clipped = np.clip(action, self.action_box.low, self.action_box.high)
        self.full_observation, reward, _, _, info = self.scene.env.step(clipped)
        self.steps += 1
        success = bool(info["success"])
        truncated = not success and self.steps >= self.suite.max_steps
        return self._observation(), float(reward), success, truncated, {"kind": self.kind, "success": success}

    def _observation(self) -> EnvObservation:
        size, box = self.suite.image_size, self.state_box
        return {
            "images": {name: self.scene.picture(camera, size) for name, camera in self.suite.cameras.items()},
            "state": np.clip(self.full_observation[:4].astype(np.float32), box.low, box.high),
            "prompt": SENTENCES[self.kind],
        }

    def render(self) -> UInt8[np.ndarray, "H W 3"]:
        return self.scene.picture(next(iter(self.suite.cameras.values())), VIDEO_SIZE)

    def close(self) -> None:
        while self._scenes:
            self._scenes.popitem()[1].close()


class MetaWorldExpert:
    """Meta-World's own scripted policy for the environment's current task."""

    def __init__(self, env: MetaWorldEnv) -> None:
        self.env = env

    def reset(self) -> None:
        from metaworld.policies import ENV_POLICY_MAP

        policies: dict[str, Any] = ENV_POLICY_MAP
        self.policy = policies[f"{self.env.kind}-v3"]()

    def __call__(self, observation: EnvObservation) -> Float[np.ndarray, " a"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its gains saturate by design: "Constant(s) may be too high"
            action = self.policy.get_action(self.env.full_observation)
        return np.clip(action, -1.0, 1.0).astype(np.float32)


class _Scene:
    """One task's Meta-World environment and the renderer of its model, made when a picture is first asked."""

    def __init__(self, kind: str, suite: MetaWorldSuite) -> None:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        self.env = ALL_V3_ENVIRONMENTS[f"{kind}-v3"]()
        # Objects and goals from the seed; the goal in the full observation, which the experts read.
        self.env._freeze_rand_vec, self.env.seeded_rand_vec, self.env._set_task_called = False, True, True
        self.env._partially_observable = False
        del self.env.sawyer_observation_space  # cached: made anew with the goal's bounds
        self.suite = suite
        self.drawn: Renderer | None = None

    def reset(self, seed: int) -> Float[np.ndarray, " 39"]:
        self.env.seed(seed)
        return self.env.reset()[0]

    def picture(self, camera: str, size: int) -> UInt8[np.ndarray, "h w 3"]:
        if self.drawn is None:
            largest = max(self.suite.image_size, VIDEO_SIZE)
            self.drawn = make_renderer(self.env.model, largest, largest, self.suite.backend)
            if self.drawn.name == RAYS:
                log.warning("Meta-World drawn by rays: the marks of target places are not in the pictures")
        pixels = self.drawn.render(self.env.data, camera, size, size)
        # Some of the scene's fixed cameras (corner, corner2) hang upside down: turn those pictures by 180.
        view = self.env.model.camera(camera)
        fixed = self.env.model.cam_bodyid[view.id] == 0
        upside_down = fixed and self.env.data.cam_xmat[view.id].reshape(3, 3)[2, 1] < 0
        return np.ascontiguousarray(pixels[::-1, ::-1]) if upside_down else pixels

    def close(self) -> None:
        if self.drawn is not None:
            self.drawn.close()
        self.env.close()


def _box(dims: tuple[Dim, ...]) -> spaces.Box:
    low, high = (np.array([getattr(d, end) for d in dims], np.float32) for end in ("low", "high"))
    return spaces.Box(low, high, dtype=np.float32)


@functools.cache
def _backend_here(backend: Backend) -> str:
    """The name of the renderer that opens on this machine, tried on an empty scene."""
    import mujoco

    drawn = make_renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8, backend)
    drawn.close()
    return drawn.name
