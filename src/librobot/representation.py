"""How a policy sees the robot's actions: absolute or relative, in which rotation numbers, which gripper sign.

Data go through `Representation.encode` in the data workers, before statistics and normalisation; a policy's
actions come back through `decode`. So a framework only knows its own view (`Representation.spec`), and
`Policy.infer` only the robot's.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from librobot.errors import nearest
from librobot.relative_actions import (
    from_relative_to_previous,
    from_relative_to_state,
    relative_to_previous,
    relative_to_state,
)
from librobot.rotations import WIDTHS, RotationKind, from_matrix, to_matrix
from librobot.rotations import nearest as nearest_rotation
from librobot.types import Dim, DimKind, RobotSpec

Frame = Literal["absolute", "relative", "delta"]


@dataclass(frozen=True)
class Group:
    """Action dimensions that are treated alike.

    dims: names (`*` stands for any text) or kinds of dimension. frame: absolute, relative (to the current
    state) or delta (to the action before, the first to the state). state: the state's dimensions that they
    start from, in the order of the robot's actions; None takes those of the same names.

    rotation: the dimensions are one rotation in this representation; to: the policy predicts it in that one.
    A relative rotation is R_state^-1 R_action. closed, open: [the robot's number, the policy's] of a closed
    and of an open gripper.
    """

    dims: tuple[str, ...]
    frame: Frame = "absolute"
    state: tuple[str, ...] | None = None
    rotation: RotationKind | None = None
    to: RotationKind | None = None
    closed: tuple[float, float] | None = None
    open: tuple[float, float] | None = None

    @classmethod
    def parse(cls, described: Mapping[str, Any], place: str) -> Group:
        """Raises ValueError that names `place`."""
        known = list(cls.__dataclass_fields__)
        for key in described:
            if key not in known:
                raise ValueError(f"{place}.{key}: {nearest(str(key), known)}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}
        group = cls(**values)
        for name, value, options in (
            ("frame", group.frame, get_args(Frame)),
            ("rotation", group.rotation, (None, *get_args(RotationKind))),
            ("to", group.to, (None, *get_args(RotationKind))),
        ):
            if value not in options:
                raise ValueError(f"{place}.{name}: {nearest(str(value), options)}")
        if group.to is not None and group.rotation is None:
            raise ValueError(f"{place}: to={group.to} needs rotation, what the robot's own numbers are")
        if (group.closed is None) != (group.open is None):
            raise ValueError(f"{place}: closed and open go together, found only one of them")
        if group.closed is not None and group.open is not None:
            if len(group.closed) != 2 or len(group.open) != 2 or group.closed[0] == group.open[0]:
                raise ValueError(
                    f"{place}: closed and open must be [robot's, policy's], with two different numbers of "
                    f"the robot, found {list(group.closed)} and {list(group.open)}"
                )
            if group.rotation is not None or group.frame != "absolute":
                raise ValueError(f"{place}: closed and open are for absolute grippers")
        return group

    def matches(self, dim: Dim) -> bool:
        """A dimension that is a change already is only taken where it is named in full."""
        for name in self.dims:
            if name == dim.name:
                return True
            if name == dim.kind or ("*" in name and fnmatch.fnmatchcase(dim.name, name)):
                return dim.mode == "absolute" or self.frame == "absolute"
        return False


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


@dataclass(frozen=True)
class Part:
    """Some dimensions of one robot: `own` are their places in its actions, `seen` in the policy's, `state` in
    the state (-1 where they start from none)."""

    own: tuple[int, ...]
    seen: tuple[int, ...]
    state: tuple[int, ...]
    frame: Frame
    group: Group

    def encode(self, actions: Float[Tensor, "b k a"], state: Float[Tensor, "b s"]) -> Tensor:
        x = actions[..., list(self.own)]
        if self.group.rotation is None:
            return self._affine(self._relative(x, state), back=False)
        x, state = x.double(), state.double()
        turned = to_matrix(x, self.group.rotation)
        if self.frame != "absolute":
            begin = to_matrix(state[:, list(self.state)], self.group.rotation)[:, None]
            before = begin if self.frame == "relative" else torch.cat((begin, turned[:, :-1]), dim=1)
            turned = before.mT @ turned
        return from_matrix(turned, self.group.to or self.group.rotation)

    def decode(self, actions: Float[Tensor, "b k o"], state: Float[Tensor, "b s"]) -> Tensor:
        x = actions[..., list(self.seen)]
        if self.group.rotation is None:
            return self._relative(self._affine(x, back=True), state, back=True)
        x, state, kind = x.double(), state.double(), self.group.rotation
        turned = to_matrix(x, self.group.to or kind)
        known = -1 not in self.state
        begin = state[:, list(self.state)] if known else None
        if self.frame != "absolute" and begin is not None:
            steps = to_matrix(begin, kind)[:, None]
            if self.frame == "relative":
                turned = steps @ turned
            else:
                every = [steps[:, 0]]
                for i in range(turned.shape[1]):
                    every.append(every[-1] @ turned[:, i])
                turned = torch.stack(every[1:], dim=1)
        numbers = from_matrix(turned, kind)
        rows, before = [], begin
        for i in range(numbers.shape[1]):
            row = numbers[:, i] if before is None else nearest_rotation(numbers[:, i], before, kind)
            rows.append(row)
            before = row
        return torch.stack(rows, dim=1)

    def _relative(self, x: Tensor, state: Tensor, *, back: bool = False) -> Tensor:
        if self.frame == "absolute":
            return x
        if self.frame == "relative":
            return (from_relative_to_state if back else relative_to_state)(x, state, self.state)
        return (from_relative_to_previous if back else relative_to_previous)(x, state, self.state)

    def _affine(self, x: Tensor, *, back: bool) -> Tensor:
        if self.group.closed is None or self.group.open is None:
            return x
        (closed, seen_closed), (opened, seen_open) = self.group.closed, self.group.open
        slope = (seen_open - seen_closed) / (opened - closed)
        return (x - seen_closed) / slope + closed if back else (x - closed) * slope + seen_closed


class RobotView:
    """One robot's parts: `dims` are the dimensions that the policy sees."""

    def __init__(self, groups: Sequence[Group], robot: RobotSpec) -> None:
        self.robot = robot
        members: dict[int, list[int]] = {}  # group -> its dimensions
        for i, dim in enumerate(robot.action):
            number = next((n for n, group in enumerate(groups) if group.matches(dim)), None)
            if number is not None:
                members.setdefault(number, []).append(i)
        self.parts: list[Part] = []
        self.kept: list[tuple[int, int]] = []  # (seen, own)
        dims: list[Dim] = []
        done: set[int] = set()
        owner = {i: number for number, own in members.items() for i in own}
        for i, dim in enumerate(robot.action):
            if i in done:
                continue
            group = groups[owner[i]] if i in owner else None
            if group is None or not _does_something(group):
                self.kept.append((len(dims), i))
                dims.append(dim)
                continue
            own = members[owner[i]] if group.rotation else [i]
            done |= set(own)
            place = f"groups[{owner[i]}]"
            made = _seen_dims(group, [robot.action[j] for j in own], place)
            state = _starts(group, [robot.action[j] for j in members[owner[i]]], robot, place)
            state = state if group.rotation else [state[members[owner[i]].index(i)]]
            seen = tuple(range(len(dims), len(dims) + len(made)))
            self.parts.append(Part(tuple(own), seen, tuple(state), group.frame, group))
            dims += made
        self.dims = tuple(dims)

    def encode(self, actions: Float[Tensor, "b k a"], state: Float[Tensor, "b s"]) -> Tensor:
        out = actions.new_empty((*actions.shape[:-1], len(self.dims)))
        for seen, own in self.kept:
            out[..., seen] = actions[..., own]
        for part in self.parts:
            out[..., list(part.seen)] = part.encode(actions, state).to(out.dtype)
        return out

    def decode(self, actions: Float[Tensor, "b k o"], state: Float[Tensor, "b s"]) -> Tensor:
        out = actions.new_empty((*actions.shape[:-1], self.robot.action_dim))
        for seen, own in self.kept:
            out[..., own] = actions[..., seen]
        for part in self.parts:
            out[..., list(part.own)] = part.decode(actions, state).to(out.dtype)
        return out


def _does_something(group: Group) -> bool:
    turns = group.rotation is not None and group.to not in (None, group.rotation)
    return group.frame != "absolute" or turns or group.closed is not None


def _seen_dims(group: Group, dims: Sequence[Dim], place: str) -> list[Dim]:
    """What the policy sees of them."""
    for dim in dims:
        if dim.mode == "delta" and group.frame != "absolute":
            raise ValueError(f"{place}: action {dim.name!r} is a change already, it cannot be {group.frame}")
    if group.rotation is None:
        if group.frame != "absolute":
            return [Dim(dim.name, dim.unit, dim.kind, "delta") for dim in dims]
        return [Dim(dim.name, dim.unit, dim.kind, dim.mode) for dim in dims]
    if len(dims) != WIDTHS[group.rotation]:
        raise ValueError(
            f"{place}: rotation={group.rotation} has {WIDTHS[group.rotation]} numbers, found "
            f"{len(dims)} dimensions: {[dim.name for dim in dims]}; give each rotation a group of its own"
        )
    kind = group.to or group.rotation
    mode: Any = dims[0].mode if group.frame == "absolute" else "delta"
    return [Dim(f"{dims[0].name}.{kind}_{i}", "", "ee_rotation", mode) for i in range(WIDTHS[kind])]


def _starts(group: Group, dims: Sequence[Dim], robot: RobotSpec, place: str) -> list[int]:
    """The state dimension that each starts from; -1 where there is none and none is needed."""
    known = [dim.name for dim in robot.state]
    names = list(group.state or [dim.name for dim in dims])
    if len(names) != len(dims):
        raise ValueError(
            f"{place}.state: expected {len(dims)} names, for {[d.name for d in dims]}, found {names}"
        )
    needless = dims[0].mode == "delta" or (group.state is None and not set(names) <= set(known))
    if group.frame == "absolute" and needless:
        return [-1] * len(dims)
    for name, dim in zip(names, dims, strict=True):
        if name not in known:
            raise ValueError(
                f"{place}: action {dim.name!r} of robot {robot.name!r} has no state {name!r} to start from; "
                f"name the state's dimensions by {place}.state; {nearest(name, known)}"
            )
    return [known.index(name) for name in names]


def rotations_as(
    to: RotationKind, *, rotation: str, dims: Sequence[str], frame: Frame = "absolute"
) -> ActionRepresentation:
    """One rotation in other numbers; two arms need `ActionRepresentation` with a group each."""
    return ActionRepresentation([{"dims": list(dims), "rotation": rotation, "to": to, "frame": frame}])
