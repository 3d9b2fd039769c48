"""Groups of action dimensions that a policy sees otherwise than the robot has them, and the numbers of it."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
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
from librobot.types import Dim, RobotSpec

Frame = Literal["absolute", "relative", "delta"]


@dataclass(frozen=True)
class Group:
    """Action dimensions that are treated alike.

    dims: names (`*` stands for any text) or kinds of dimension. frame: absolute, relative (to the current
    state) or delta (to the action before, the first to the state). state: the state's dimensions that they
    start from, in the order of the robot's actions; None takes those of the same names.

    rotation: the dimensions are one rotation in this representation; to: the policy predicts it in that one.
    A relative rotation is R_state^-1 R_action. pose: three numbers of a position come before it, and both are
    seen from the pose that they start from: R_state^-1 (p_action - p_state). closed, open: [the robot's
    number, the policy's] of a closed and of an open gripper.
    """

    dims: tuple[str, ...]
    frame: Frame = "absolute"
    state: tuple[str, ...] | None = None
    rotation: RotationKind | None = None
    to: RotationKind | None = None
    pose: bool = False
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
        if group.pose and (group.rotation is None or group.frame == "absolute"):
            raise ValueError(
                f"{place}: pose=true needs rotation, and frame=relative or delta, found "
                f"rotation={group.rotation} and frame={group.frame}"
            )
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
        place, turned = self._split(x.double(), self.group.rotation)
        if self.frame != "absolute":
            first, begin = self._split(state.double()[:, None, list(self.state)], self.group.rotation)
            if self.frame == "delta":
                first = torch.cat((first, place[:, :-1]), dim=1)
                begin = torch.cat((begin, turned[:, :-1]), dim=1)
            place = self._turn(place - first, begin.mT)
            turned = begin.mT @ turned
        return torch.cat((place, from_matrix(turned, self.group.to or self.group.rotation)), dim=-1)

    def decode(self, actions: Float[Tensor, "b k o"], state: Float[Tensor, "b s"]) -> Tensor:
        x = actions[..., list(self.seen)]
        if self.group.rotation is None:
            return self._relative(self._affine(x, back=True), state, back=True)
        kind, known = self.group.rotation, -1 not in self.state
        place, turned = self._split(x.double(), self.group.to or kind)
        start = state.double()[:, None, list(self.state)] if known else None
        if self.frame != "absolute" and start is not None:
            at, facing = self._split(start, kind)
            places, turns = [], []
            for i in range(turned.shape[1]):
                moved = at + self._turn(place[:, i : i + 1], facing)
                rotated = facing @ turned[:, i : i + 1]
                places.append(moved)
                turns.append(rotated)
                if self.frame == "delta":
                    at, facing = moved, rotated
            place, turned = torch.cat(places, dim=1), torch.cat(turns, dim=1)
        numbers = from_matrix(turned, kind)
        before = None if start is None else start[:, 0, self.position :]
        rows = []
        for i in range(numbers.shape[1]):
            row = numbers[:, i] if before is None else nearest_rotation(numbers[:, i], before, kind)
            rows.append(row)
            before = row
        return torch.cat((place, torch.stack(rows, dim=1)), dim=-1)

    @property
    def position(self) -> int:
        """How many numbers of a position come before the rotation."""
        return 3 if self.group.pose else 0

    def _split(self, x: Float[Tensor, "b k n"], kind: RotationKind) -> tuple[Tensor, Tensor]:
        """The position (b, k, 3), of no numbers where the group has none, and the rotation (b, k, 3, 3)."""
        return x[..., : self.position], to_matrix(x[..., self.position :], kind)

    def _turn(self, place: Float[Tensor, "b k p"], rotation: Float[Tensor, "b #k 3 3"]) -> Tensor:  # noqa: F821
        return (rotation @ place[..., None])[..., 0] if self.group.pose else place

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
    before = 3 if group.pose else 0
    if len(dims) != before + WIDTHS[group.rotation]:
        what = "pose=true has 3 and " if group.pose else ""
        raise ValueError(
            f"{place}: {what}rotation={group.rotation} has {WIDTHS[group.rotation]} numbers, found "
            f"{len(dims)} dimensions: {[dim.name for dim in dims]}; give each rotation a group of its own"
        )
    kind = group.to or group.rotation
    mode: Any = dims[0].mode if group.frame == "absolute" else "delta"
    moved = [Dim(dim.name, dim.unit, dim.kind, "delta") for dim in dims[:before]]
    dims = dims[before:]
    return moved + [Dim(f"{dims[0].name}.{kind}_{i}", "", "ee_rotation", mode) for i in range(WIDTHS[kind])]


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
