"""lerobot's plain relative actions (`use_relative_actions`): action i less the current state i, both ways.

Names that `exclude_joints` holds, or parts of names, stay absolute; a policy without names of its actions has
all of them relative. The statistics beside them are of the relative actions already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from librobot.errors import LibrobotError
from librobot.interchange.files import read_json
from librobot.interchange.lerobot.folder import LeRobotFolder
from librobot.policy import Policy
from librobot.types import RobotSpec

STEP, BACK = "relative_actions_processor", "absolute_actions_processor"


def groups(folder: LeRobotFolder, spec: RobotSpec) -> list[dict[str, Any]]:
    """The groups of `actions=`, none where actions are absolute. Raises LibrobotError where the state is
    shorter than what starts from it."""
    place = folder.path / "policy_preprocessor.json"
    steps = read_json(place).get("steps", []) if place.is_file() else []
    step = next((item for item in steps if item.get("registry_name") == STEP), None)
    if step is not None:
        described = step["config"]
        enabled, names = described.get("enabled", False), described.get("action_names")
        excluded = described.get("exclude_joints")
    else:
        config = folder.config
        enabled, names = config.get("use_relative_actions", False), config.get("action_feature_names")
        excluded = config.get("relative_exclude_joints")
    if not enabled:
        return []
    words = [str(word).lower() for word in excluded or [] if word] if names is not None else []
    own = [str(name).lower() for name in names or []][: spec.action_dim]
    own += [""] * (spec.action_dim - len(own))
    places = [i for i, name in enumerate(own) if not any(word in name for word in words)]
    if places and places[-1] >= spec.state_dim:
        raise LibrobotError(
            f"{place}: action {places[-1]} is relative to state {places[-1]}, and the state has "
            f"{spec.state_dim} dimensions"
        )
    if not places:
        return []
    return [
        {
            "dims": [spec.action[i].name for i in places],
            "frame": "relative",
            "state": [spec.state[i].name for i in places],
        }
    ]


def representation(folder: LeRobotFolder, spec: RobotSpec) -> dict[str, Any]:
    """What `actions=` becomes, as an entry of `Imported.values`; {} where actions are absolute."""
    found = groups(folder, spec)
    target = "librobot.representation.ActionRepresentation"
    return {"actions": {"_target_": target, "groups": found}} if found else {}


def exported(policy: Policy) -> dict[str, Any]:
    """The policy's options in config.json, {} where its actions are absolute.

    Raises LibrobotError for a view of the actions that lerobot does not have: rotations, gripper signs,
    deltas, another state to start from.
    """
    seen = policy.framework.robots.representation
    if seen is None or not seen.changes:
        return {}
    names = [dim.name for dim in policy.spec.action]
    moved = set()
    for part in seen.parts(0):
        if part.frame != "relative" or part.group.rotation or part.group.closed or part.own != part.state:
            raise LibrobotError(
                f"lerobot knows relative actions as action i less state i alone, and {names[part.own[0]]!r} "
                f"is seen otherwise here (actions=): frame {part.frame}, rotation {part.group.rotation}, "
                f"from states {list(part.state)}"
            )
        moved |= set(part.own)
    kept = [name for i, name in enumerate(names) if i not in moved]
    for i in sorted(moved):
        caught = [name for name in kept if name.lower() in names[i].lower()]
        if caught:
            raise LibrobotError(
                f"lerobot leaves out every action whose name holds a given word: {caught[0]!r}, which stays "
                f"absolute, is part of {names[i]!r}, which is relative; rename one of them"
            )
    return {
        "use_relative_actions": True,
        "relative_exclude_joints": kept,
        "action_feature_names": names,
    }


def steps(config: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The steps before the normalizer and behind the unnormalizer, for a config.json with `exported`."""
    if not config.get("use_relative_actions"):
        return [], []
    described = {
        "enabled": True,
        "exclude_joints": config["relative_exclude_joints"],
        "action_names": config["action_feature_names"],
    }
    return [{"registry_name": STEP, "config": described}], [
        {"registry_name": BACK, "config": {"enabled": True}}
    ]
