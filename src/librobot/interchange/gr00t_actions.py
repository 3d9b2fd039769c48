"""Which actions of a GR00T checkpoint are relative to the state, and the statistics of each group.

A relative group has statistics of its own for every step of a chunk ("relative_action"): always the smallest
and largest values, also where the other groups take quantiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from librobot.errors import LibrobotError
from librobot.interchange.files import member
from librobot.normalize import every_step
from librobot.types import Dim, RobotSpec

NARROWEST = 1e-8
"""Of a dimension's half range: below it all its values are one. What is clipped to [-1, 1] may be as narrow,
and the first actions of relative chunks are."""
POSES = ("xyz_rot6d", "xyz+rot6d")
"""The formats of an end effector's pose that are read: a position and two rows of the rotation."""
POSE_WIDTH = 9
STATISTICS = ("mean", "std", "min", "max", "q01", "q99")


def dim_names(group: str, count: int) -> list[str]:
    """The names of a group's dimensions."""
    return [f"{group}_{i}" for i in range(count)] if count > 1 else [group]


@dataclass(frozen=True)
class Start:
    """Where relative actions start: from a group of the state, dimension by dimension or as a pose."""

    state: str
    pose: bool = False


def relative_groups(
    tag: str, action: Mapping[str, Any], statistics: Mapping[str, Any], place: Path
) -> dict[str, Start]:
    """Relative groups of actions -> what they start from.

    Raises LibrobotError where actions are given in a way that librobot does not read, or lack their state.
    """
    found: dict[str, Start] = {}
    for name, how in zip(action["modality_keys"], action.get("action_configs") or [], strict=False):
        rep = last_word(how.get("rep", "absolute"))
        if rep == "absolute":
            continue
        kind, form = last_word(how.get("type", "non_eef")), last_word(how.get("format", "default"))
        if rep != "relative" or kind not in ("non_eef", "eef") or (kind == "eef" and form not in POSES):
            raise LibrobotError(
                f"{place}: actions {name!r} of robot {tag!r} must be absolute, relative, or an end "
                f"effector's relative pose as xyz and rot6d, found rep={rep} type={kind} format={form}; "
                f"librobot does not read that, choose another robot by --embodiment NAME"
            )
        state = how.get("state_key") or name
        sizes = {
            key: np.shape(member(statistics, (key, group, "min"), place))[-1:]
            for key, group in (("action", name), ("state", state))
        }
        if sizes["action"] != sizes["state"]:
            raise LibrobotError(
                f"{place}: actions {name!r} of robot {tag!r} are relative to the state's {state!r}, and must "
                f"have as many dimensions, found {sizes['action']} and {sizes['state']}"
            )
        if kind == "eef" and sizes["action"] != (POSE_WIDTH,):
            raise LibrobotError(
                f"{place}: actions {name!r} of robot {tag!r}: a pose as xyz and rot6d has {POSE_WIDTH} "
                f"dimensions, found {sizes['action']}"
            )
        found[name] = Start(state, pose=kind == "eef")
    return found


def last_word(value: Any) -> str:
    """An enumeration's member as its name: "ActionType.NON_EEF" is "non_eef"."""
    return str(value).rpartition(".")[2].lower()


def seen_actions(
    relative: Mapping[str, Start],
    statistics: Mapping[str, Any],
    robot: RobotSpec,
    *,
    state: Iterable[str],
    action: Iterable[str],
) -> list[dict[str, Any]]:
    """The groups of `actions=` for them. `state` and `action` are all of the robot's groups, in order."""

    def places(key: str, groups: Iterable[str], dims: Sequence[Dim]) -> dict[str, list[str]]:
        found, first = {}, 0
        for group in groups:
            size = np.shape(statistics[key][group]["min"])[-1]
            found[group] = [dim.name for dim in dims[first : first + size]]
            first += size
        return found

    states, actions = places("state", state, robot.state), places("action", action, robot.action)
    return [
        {"dims": actions[name], "frame": "relative", "state": states[start.state]}
        | ({"rotation": "rot6d", "pose": True} if start.pose else {})
        for name, start in relative.items()
    ]


def representation(
    seen: Mapping[str, list[dict[str, Any]]], robots: Sequence[RobotSpec], place: Path
) -> dict[str, Any]:
    """The node `actions=` for all robots of a checkpoint (tag -> `seen_actions`).

    Raises LibrobotError where two of them see a dimension of one name in two ways.
    """
    groups = [group for own in seen.values() for group in own]
    if len(robots) > 1:  # of which one may have a part of another's dimensions
        ways: dict[str, tuple[Any, str]] = {}
        for (tag, own), robot in zip(seen.items(), robots, strict=True):
            start = {name: way for group in own for name, way in ways_of(group).items()}
            for dim in robot.action:
                own_way = start.get(dim.name)
                way = ways.setdefault(dim.name, (own_way, tag))
                if way[0] != own_way:
                    raise LibrobotError(
                        f"{place}: action {dim.name!r} is relative to {own_way} for robot {tag!r} and to "
                        f"{way[0]} for {way[1]!r}; choose one of them by --embodiment NAME"
                    )
        poses = {tuple(group["dims"]): group for group in groups if group.get("pose")}
        groups = list(poses.values()) + [
            {"dims": [name], "frame": "relative", "state": [way]}
            for name, (way, _) in ways.items()
            if isinstance(way, str)
        ]
    return {"_target_": "librobot.representation.ActionRepresentation", "groups": groups}


def ways_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Each dimension of a group -> the state that it starts from; of a pose the whole of it."""
    if group.get("pose"):
        return dict.fromkeys(group["dims"], (tuple(group["dims"]), tuple(group["state"])))
    return dict(zip(group["dims"], group["state"], strict=True))


def joined(
    statistics: Mapping[str, Any],
    key: str,
    groups: Iterable[str],
    place: Path,
    *,
    relative: Sequence[str] = (),
    steps: int = 1,
) -> dict[str, np.ndarray]:
    """The groups' statistics of `key` as one vector each; (steps, dimensions) where some are `relative`."""
    parts = []
    for group in groups:
        if group not in relative:
            parts.append(arrays(member(statistics, (key, group), place)))
            continue
        own = arrays(member(statistics, ("relative_action", group), place))
        for bound in ("min", "max"):
            member(own, (bound,), place)
        parts.append(own | {"q01": own["min"], "q99": own["max"]})
    if relative:
        parts = [{name: every_step(value, steps) for name, value in part.items()} for part in parts]
    return {
        name: np.concatenate([part[name] for part in parts], axis=-1)
        for name in STATISTICS
        if parts and all(name in part for part in parts)
    }


def arrays(group: Mapping[str, Any]) -> dict[str, np.ndarray]:
    found = {name: np.asarray(group[name], dtype=np.float64) for name in STATISTICS if name in group}
    return {name: value if value.ndim == 2 else value.reshape(-1) for name, value in found.items()}
