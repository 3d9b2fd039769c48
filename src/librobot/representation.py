"""How a policy sees the robot's actions: absolute or relative, in which rotation numbers, which gripper sign.

Data go through `Representation.encode` in the data workers, before statistics and normalisation; a policy's
actions come back through `decode`. So a framework only knows its own view (`Representation.spec`), and
`Policy.infer` only the robot's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from jaxtyping import Float, Int
from torch import Tensor

from librobot.action_groups import Frame, Group, Part, RobotView
from librobot.errors import nearest
from librobot.rotations import RotationKind
from librobot.types import Dim, DimKind, RobotSpec


class ActionRepresentation:
    """The `actions=` group: for each of `groups` (see `Group`), what the policy sees. The first group that
    names a dimension has it; a dimension of no group stays as it is."""

    def __init__(self, groups: Sequence[Mapping[str, Any]] = ()) -> None:
        self.groups = [Group.parse(group, f"groups[{i}]") for i, group in enumerate(groups)]

    def bind(self, spec: RobotSpec, robots: Sequence[RobotSpec] | None = None) -> Representation:
        """For a robot, or several of which `spec` is the union."""
        return Representation(self.groups, spec, robots)


class Representation:
    """Bound to robots. `robot` and `robots` are theirs, `spec` and `embodiments` what the policy sees.

    Raises ValueError where a group fits no robot: unknown names, no state to start from, a rotation of
    another width.
    """

    def __init__(self, groups: Sequence[Group], spec: RobotSpec, robots: Sequence[RobotSpec] | None) -> None:
        self.robot, self.robots = spec, tuple(robots or (spec,))
        self._views = [RobotView(groups, robot) for robot in self.robots]
        for i, group in enumerate(groups):
            for name in group.dims:
                if "*" not in name and name not in get_args(DimKind):
                    known = [dim.name for robot in self.robots for dim in robot.action]
                    if name not in known:
                        raise ValueError(f"groups[{i}].dims: {name!r}: {nearest(name, known)}")
        own = [replace(view.robot, action=view.dims) for view in self._views]
        self.embodiments = tuple(own) if robots is not None else None
        widest = max((view.dims for view in self._views), key=len)
        padding = spec.action_dim - max(robot.action_dim for robot in self.robots)
        padded = widest + tuple(Dim(f"padding_{i}") for i in range(len(widest), len(widest) + padding))
        self.spec = replace(spec, action=padded) if robots is not None else own[0]

    @property
    def changes(self) -> bool:
        return any(view.parts for view in self._views)

    @property
    def sees_deltas(self) -> bool:
        return any(part.frame == "delta" for view in self._views for part in view.parts)

    def parts(self, robot: int) -> list[Part]:
        """What a robot's actions are seen otherwise in."""
        return self._views[robot].parts

    def untouched(self, robot: int) -> list[tuple[int, int]]:
        """(where the policy sees it, where the robot has it) of each dimension that stays as it is."""
        return self._views[robot].kept

    def encode(
        self,
        actions: Float[Tensor, "b k a"],
        state: Float[Tensor, "b s"],
        embodiment: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b k o"]:
        """The robot's actions as the policy sees them; `state` is the current one, in physical units."""
        return self._each("encode", actions, state, embodiment, self.spec.action_dim)

    def decode(
        self,
        actions: Float[Tensor, "b k o"],
        state: Float[Tensor, "b s"],
        embodiment: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b k a"]:
        """The inverse: of two numbers that are one rotation, the ones next to the state's."""
        return self._each("decode", actions, state, embodiment, self.robot.action_dim)

    def _each(
        self, way: str, actions: Tensor, state: Tensor, embodiment: Tensor | None, width: int
    ) -> Float[Tensor, "b k o"]:
        out = actions.new_zeros((*actions.shape[:2], width))
        for number, view in enumerate(self._views):
            chosen = slice(None) if embodiment is None else embodiment == number
            given = actions[chosen]
            found = getattr(view, way)(
                given[..., : len(view.robot.action if way == "encode" else view.dims)], state[chosen]
            )
            out[chosen, :, : found.shape[-1]] = found
            if embodiment is None:
                break
        return out


def rotations_as(
    to: RotationKind, *, rotation: str, dims: Sequence[str], frame: Frame = "absolute"
) -> ActionRepresentation:
    """One rotation in other numbers; two arms need `ActionRepresentation` with a group each."""
    return ActionRepresentation([{"dims": list(dims), "rotation": rotation, "to": to, "frame": frame}])


def relative_pose(
    rotation: str, *, to: RotationKind = "rot6d", dims: Sequence[str], frame: Frame = "relative"
) -> ActionRepresentation:
    """An end effector's pose seen from the current one; two arms need `ActionRepresentation` with a group
    each."""
    group = {"dims": list(dims), "rotation": rotation, "to": to, "frame": frame, "pose": True}
    return ActionRepresentation([group])
