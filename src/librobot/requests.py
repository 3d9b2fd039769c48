"""What a policy is asked with, held against the robot that it is for: one sentence for each thing wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from librobot.errors import LibrobotError, nearest
from librobot.types import Camera, RobotSpec


def which_robot(observation: Mapping[str, Any], robots: Sequence[RobotSpec]) -> int:
    """The number of the robot that the observation names; a policy for one robot needs no name."""
    names = [robot.name for robot in robots]
    if "robot" not in observation:
        if len(robots) == 1:
            return 0
        raise LibrobotError(f"the policy is for several robots: name one of {names} under 'robot'")
    if observation["robot"] not in names:
        raise LibrobotError(
            f"the policy does not know robot {observation['robot']!r}; "
            f"{nearest(str(observation['robot']), names)}"
        )
    return names.index(observation["robot"])


def check_observation(
    observation: Mapping[str, Any],
    robot: RobotSpec,
    obs_steps: int,
    *,
    needs_prompt: bool,
    masks_cameras: bool,
    reads_goals: bool = False,
) -> dict[str, Any]:
    """The observation with a time axis everywhere but in goals, without the cameras that are hidden.

    Raises LibrobotError with what is wrong with it.
    """
    for key in ("images", "state", "prompt"):
        if key not in observation:
            raise LibrobotError(f"the observation lacks {key!r}; it has {sorted(observation)}")
    prompt = observation["prompt"]
    if not isinstance(prompt, str):
        raise LibrobotError(f"the observation's prompt must be text, found {type(prompt).__name__}")
    goals = observation.get("goal_images") or {}
    if goals and not reads_goals:
        raise LibrobotError("the observation has goal_images, and this policy reads none; leave them out")
    for name in goals:
        if name not in [camera.name for camera in robot.cameras]:
            raise LibrobotError(f"goal_images: {nearest(name, [camera.name for camera in robot.cameras])}")
    if needs_prompt and not prompt.strip() and not goals:
        raise LibrobotError(
            "the observation's prompt is empty; give the instruction, such as 'reach the red cube'"
        )
    images = {
        camera.name: check_image(observation["images"], camera, robot.name, obs_steps, masks_cameras)
        for camera in robot.cameras
    }
    return {
        "images": {name: image for name, image in images.items() if image is not None},
        "state": check_state(observation["state"], robot, obs_steps),
        "prompt": prompt,
        "goal_images": {
            camera.name: goal[0]
            for camera in robot.cameras
            if camera.name in goals
            and (goal := check_image(goals, camera, robot.name, 1, masks_cameras)) is not None
        },
    }


def check_image(
    images: Mapping[str, Any], camera: Camera, robot: str, obs_steps: int, masks_cameras: bool
) -> np.ndarray | None:
    """The camera's pictures (t, h, w, 3); None where the camera is hidden and the policy can do without."""
    name = camera.name
    if name not in images:
        without = f"; to act without it, give None for {name!r}" if masks_cameras else ""
        raise LibrobotError(
            f"the observation lacks camera {name!r} of robot {robot!r}; {nearest(name, images)}{without}"
        )
    if images[name] is None:
        if masks_cameras:
            return None
        raise LibrobotError(f"camera {name!r} is None, and this policy cannot act without a camera's picture")
    image = np.asarray(images[name])
    if image.dtype != np.uint8:
        raise LibrobotError(
            f"camera {name!r}: images are uint8 in [0, 255], found {image.dtype}; multiply floats in "
            f"[0, 1] by 255 and convert"
        )
    expected = (obs_steps, camera.height, camera.width, 3)
    if obs_steps == 1 and image.ndim == 3:
        image = image[None]
    if image.shape != expected:
        wanted = expected[1:] if obs_steps == 1 else expected
        found = image.shape[1:] if obs_steps == 1 and image.ndim == 4 else image.shape
        hint = "; put channels last" if image.ndim >= 3 and image.shape[-3] == 3 else ""
        raise LibrobotError(f"camera {name!r}: images must have shape {wanted}, found {found}{hint}")
    return image


def check_state(value: Any, robot: RobotSpec, obs_steps: int) -> np.ndarray:
    """The state (t, s), float32."""
    state = np.asarray(value, dtype=np.float32)
    if obs_steps == 1 and state.ndim == 1:
        state = state[None]
    expected = (obs_steps, robot.state_dim)
    if state.shape != expected:
        names = ", ".join(dim.name for dim in robot.state)
        wanted = expected[1:] if obs_steps == 1 else expected
        raise LibrobotError(f"the state must have shape {wanted} ({names}), found {np.asarray(value).shape}")
    if not np.isfinite(state).all():
        raise LibrobotError(f"the state must be finite, found {state[~np.isfinite(state)][0]}")
    return state
