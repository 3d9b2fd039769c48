"""Where an HDF5 file keeps what: three published layouts, or one described in YAML.

robomimic (robomimic v0.4, docs/datasets/overview) and LIBERO (scripts/create_dataset.py) hold many episodes
in a file, data/demo_*; ACT and ALOHA (record_sim_episodes.py) one episode in each file, episode_*.hdf5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from librobot.errors import nearest
from librobot.types import Dim


@dataclass(frozen=True)
class Layout:
    """files: a pattern below the folder. episode: a pattern of the groups that are episodes; "" where the
    file is one. state, action: datasets (T,) or (T, dims) of the episode, joined in this order. cameras: name
    -> dataset of pictures (T, h, w, 3), (T, 3, h, w), or encoded ones (T, bytes); {"*": "GROUP"} takes all of
    a group. prompt: where the instruction may stand, "GROUP:ATTRIBUTE", GROUP "." for the episode and "/" for
    the file, ATTRIBUTE.KEY into its JSON. action_dims: what the dimensions mean, where their number is right.
    """

    files: str
    episode: str
    state: tuple[str, ...]
    action: tuple[str, ...]
    cameras: Mapping[str, str]
    prompt: tuple[str, ...] = ()
    control_hz: float = 20.0
    robot: str = "unknown"
    action_dims: tuple[Dim, ...] = ()
    state_dims: tuple[Dim, ...] = ()


def _pose_delta() -> tuple[Dim, ...]:
    """robosuite's OSC_POSE: inputs of [-1, 1], scaled by the controller; +1 closes the gripper."""
    position = [Dim(axis, "", "ee_position", "delta", -1.0, 1.0) for axis in "xyz"]
    rotation = [Dim(f"r{axis}", "", "ee_rotation", "delta", -1.0, 1.0) for axis in "xyz"]
    return (*position, *rotation, Dim("gripper", "", "gripper", "absolute", -1.0, 1.0))


ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
ALOHA = tuple(
    dim
    for side in ("left", "right")
    for dim in (
        *(Dim(f"{side}_{joint}", "rad", "joint") for joint in ARM),
        Dim(f"{side}_gripper", kind="gripper"),
    )
)

LAYOUTS = {
    "robomimic": Layout(
        files="**/*.hdf5",
        episode="data/*",
        state=("obs/robot0_eef_pos", "obs/robot0_eef_quat", "obs/robot0_gripper_qpos"),
        action=("actions",),
        cameras={"agentview": "obs/agentview_image", "wrist": "obs/robot0_eye_in_hand_image"},
        prompt=(".:ep_meta.lang", "data:env_args.env_name"),
        robot="robosuite",
        action_dims=_pose_delta(),
    ),
    "libero": Layout(
        files="**/*.hdf5",
        episode="data/*",
        state=("obs/ee_states", "obs/gripper_states"),
        action=("actions",),
        cameras={"agentview": "obs/agentview_rgb", "wrist": "obs/eye_in_hand_rgb"},
        prompt=("data:problem_info.language_instruction",),
        robot="libero_panda",
        action_dims=_pose_delta(),
    ),
    "aloha": Layout(
        files="**/episode_*.hdf5",
        episode="",
        state=("observations/qpos",),
        action=("action",),
        cameras={"*": "observations/images"},
        prompt=(".:instruction", ".:language_instruction", ".:task"),
        control_hz=50.0,
        robot="aloha",
        action_dims=ALOHA,
        state_dims=ALOHA,
    ),
}


def read_layout(described: str | Mapping[str, Any]) -> Layout:
    """A layout by name, or from its fields; "base" in them names the layout that they change.

    Raises ValueError for an unknown name or field, and for a field of the wrong kind.
    """
    if isinstance(described, str):
        if described not in LAYOUTS:
            raise ValueError(f"layout: {nearest(described, LAYOUTS)}; or describe one by its fields")
        return LAYOUTS[described]
    given = dict(described)
    base = given.pop("base", None)
    known = [field.name for field in fields(Layout)]
    for key in given:
        if key not in known:
            raise ValueError(f"layout.{key}: {nearest(key, ['base', *known])}")
    start = {} if base is None else {name: getattr(read_layout(base), name) for name in known}
    for key in ("state", "action", "prompt"):
        if key in given:
            given[key] = _names(key, given[key])
    for key in ("state_dims", "action_dims"):
        if key in given:
            given[key] = tuple(
                Dim(**dim) if isinstance(dim, Mapping) else Dim(str(dim)) for dim in given[key]
            )
    if not isinstance(given.get("cameras", {}), Mapping):
        raise ValueError(f"layout.cameras: expected name: dataset, found {given['cameras']!r}")
    merged = {"state": (), "cameras": {}, "files": "**/*.hdf5", **start, **given}
    if missing := [name for name in ("episode", "action") if name not in merged]:
        raise ValueError(f"layout: lacks {' and '.join(missing)}")
    return Layout(**merged)


def _names(key: str, value: str | Sequence[str] | None) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value or ())
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"layout.{key}: expected names of datasets, found {value!r}")
    return names
