"""What every dataset format provides, and the check of a dataset against a named robot."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, UInt8

from librobot.errors import LibrobotError, nearest
from librobot.types import RobotSpec

CacheMode = Literal["none", "memmap"]


@runtime_checkable
class Source(Protocol):
    """Episodes of one robot, addressed by global frame index ("row"): episode 0's frames, then episode 1's,
    ...

    Picklable, and usable in several processes at once. `spec` gives the cameras in the size that `images`
    delivers. `provenance` holds plain types: {"root", "renderer", "env", ...}.
    """

    spec: RobotSpec
    episode_lengths: Int[np.ndarray, " episodes"]
    provenance: dict[str, Any]

    def states(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n s"]:
        """float32, physical units."""

    def actions(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n a"]:
        """float32, physical units."""

    def images(self, rows: Int[np.ndarray, " n"]) -> dict[str, UInt8[np.ndarray, "n c h w"]]:
        """One array per camera, in the order of `spec.cameras`."""

    def prompts(self, rows: Int[np.ndarray, " n"]) -> list[str]:
        """The instruction of each frame."""

    def statistics(self) -> dict[str, dict[str, Float[np.ndarray, " dim"]]]:
        """{"state" and "action": {"mean", "std", "min", "max", "q01", "q99"}}, float64, over every frame."""


class SourceFactory(Protocol):
    """How a `source:` node with `_partial_: true` is called: with the options that every format shares.

    cameras: a subset by name, or None for all. image_size: (h, w) to resize to with the aspect kept, or None
    for the stored size. cache: "memmap" decodes every frame once into a file of raw pixels; "none" decodes at
    each use.
    """

    def __call__(
        self,
        *,
        cameras: Sequence[str] | None,
        image_size: tuple[int, int] | None,
        cache: CacheMode,
    ) -> Source: ...


def check_spec(data: RobotSpec, robot: RobotSpec) -> RobotSpec:
    """`robot` with the image sizes that the dataset delivers; LibrobotError where the two do not fit.

    data: `source.spec`. robot: the spec that the config names. The cameras and the dimensions must be the
    same; the robot's names, units and limits win, since a dataset seldom knows them.
    """
    for camera in data.camera_names:
        if camera not in robot.camera_names:
            raise LibrobotError(
                f"the dataset has a camera {camera!r} that robot {robot.name!r} does not name; "
                f"{nearest(camera, robot.camera_names)}. Leave it out with data.cameras="
                f"[{','.join(name for name in data.camera_names if name in robot.camera_names)}], "
                "add it to the robot's YAML, or use robot=from_data"
            )
    for camera in robot.camera_names:
        if camera not in data.camera_names:
            raise LibrobotError(
                f"robot {robot.name!r} has a camera {camera!r} that the dataset lacks; "
                f"{nearest(camera, data.camera_names)}. Remove it from the robot's YAML or use "
                "robot=from_data"
            )
    for what, found, expected in (
        ("state", data.state, robot.state),
        ("action", data.action, robot.action),
    ):
        if len(found) != len(expected):
            raise LibrobotError(
                f"{what}: robot {robot.name!r} has {len(expected)} dimensions "
                f"({', '.join(dim.name for dim in expected)}), the dataset {len(found)} "
                f"({', '.join(dim.name for dim in found)})"
            )
    if abs(data.control_hz - robot.control_hz) > 1e-6 * robot.control_hz:
        warnings.warn(
            f"the dataset was recorded at {data.control_hz:g} Hz and robot {robot.name!r} acts at "
            f"{robot.control_hz:g} Hz: actions will play at another speed",
            stacklevel=2,
        )
    sizes = {camera.name: camera for camera in data.cameras}
    return replace(robot, cameras=tuple(sizes[name] for name in robot.camera_names))
