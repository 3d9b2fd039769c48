"""A dataset at a fraction of its rate: every Nth frame, and one action for each stride.

An action covers the frames f .. f + stride - 1 of its episode. Of a dimension that is a target
(`mode: absolute`) it is the last of their actions, which is where the robot shall be when the stride is over;
of one that is a change (`mode: delta`) it is their sum. Changes of a rotation are composed, later turns about
the same fixed axes as earlier ones: R = R_last ... R_first. Past the episode's end the robot stays where it
is: nothing is added, and a target is the last one.

Every frame still begins a sample, so no frame is lost: `Windows` takes observations and actions
`strides_of(source)` frames apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8

from librobot.data.sources.base import Source
from librobot.data.statistics import kept_statistics
from librobot.errors import LibrobotError
from librobot.rotations import WIDTHS, from_matrix, nearest, to_matrix
from librobot.types import Dim, RobotSpec

StrideRotation = Literal["sum", "axis_angle", "euler", "quaternion", "rot6d"]
"""What the numbers of a rotation's change are; "sum" adds them, which is right for small turns."""
BLOCK = 1 << 16
UNITS = {"rad": 1.0, "deg": math.pi / 180}


class StridedSource:
    """`source`, each of whose actions is what `stride` frames do; `spec.control_hz` is that of strides.

    rotation: what changes of rotations are (dimensions of kind ee_rotation and mode delta); only needed where
    there are such. Raises LibrobotError where it is not said, or cannot be.
    """

    def __init__(self, source: Source, stride: int, rotation: StrideRotation | None = None) -> None:
        if stride < 1:
            raise ValueError(f"stride must be at least 1, found {stride}")
        if rotation is not None and rotation not in get_args(StrideRotation):
            raise ValueError(
                f"stride_rotation must be one of {', '.join(get_args(StrideRotation))}, found {rotation!r}"
            )
        self.source, self.stride = source, stride
        own = source.spec
        self.spec: RobotSpec = replace(
            own,
            action=tuple(_summed(dim, stride) for dim in own.action),
            control_hz=own.control_hz / stride,
        )
        self._delta = np.array([dim.mode == "delta" for dim in own.action])
        self._turns = _turns(own.action, rotation, str(source.provenance.get("root", "the dataset")))
        self._rotation = rotation
        self.episode_lengths = source.episode_lengths
        self._ends = np.cumsum(source.episode_lengths)
        self.provenance: dict[str, Any] = {
            **source.provenance,
            "stride": stride,
            "recorded_hz": own.control_hz,
        }

    @property
    def strides(self) -> Int[np.ndarray, " e"]:
        return np.full(len(self.episode_lengths), self.stride)

    def states(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n s"]:
        return self.source.states(rows)

    def images(self, rows: Int[np.ndarray, " n"]) -> dict[str, UInt8[np.ndarray, "n c h w"]]:
        return self.source.images(rows)

    def prompts(self, rows: Int[np.ndarray, " n"]) -> list[str]:
        return self.source.prompts(rows)

    def actions(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n a"]:
        """What the frames from each row on do, until the stride or the episode is over."""
        rows = np.asarray(rows, np.int64)
        last = self._ends[np.searchsorted(self._ends, rows, side="right")] - 1
        taken = rows[:, None] + np.arange(self.stride)
        real = taken <= last[:, None]
        each = self.source.actions(np.minimum(taken, last[:, None]).reshape(-1))
        each = each.reshape(len(rows), self.stride, -1)
        out = each[:, -1].copy()
        changes = np.where(real[:, :, None], each[:, :, self._delta], 0)
        out[:, self._delta] = changes.sum(axis=1, dtype=np.float64)
        for dims, scale in self._turns:
            out[:, dims] = _composed(each[:, :, dims] * scale, real, str(self._rotation)) / scale
        return out

    def statistics(self) -> dict[str, dict[str, Float[np.ndarray, " dim"]]]:
        """States' are the dataset's own; actions' are those of strides."""
        from librobot.data.sources.stored import default_cache_dir

        rows = np.arange(int(self._ends[-1]))
        actions = np.concatenate([self.actions(rows[i : i + BLOCK]) for i in range(0, len(rows), BLOCK)])
        folder = default_cache_dir() / "statistics"
        return {"state": self.source.statistics()["state"], "action": kept_statistics(actions, folder)}


@runtime_checkable
class Strides(Protocol):
    """A source some of whose episodes are strided: how many frames apart the steps of each are."""

    strides: Int[np.ndarray, " e"]


def strides_of(source: Source) -> Int[np.ndarray, " e"]:
    """How many frames apart the steps of each episode are: 1 where nothing says otherwise."""
    if isinstance(source, Strides):
        return np.asarray(source.strides, np.int64)
    return np.ones(len(source.episode_lengths), np.int64)


def strided(source: Source, stride: int = 1, rotation: StrideRotation | None = None) -> Source:
    """The source at a fraction of its rate; of a mixture those datasets that have no stride of their own."""
    if stride == 1:
        return source
    whole: Callable[..., Source] | None = getattr(source, "with_stride", None)
    return StridedSource(source, stride, rotation) if whole is None else whole(stride, rotation)


def _summed(dim: Dim, stride: int) -> Dim:
    """With the limits of a sum, where it is a change."""
    return dim if dim.mode != "delta" else replace(dim, low=dim.low * stride, high=dim.high * stride)


def _turns(
    dims: tuple[Dim, ...], rotation: StrideRotation | None, place: str
) -> list[tuple[Int[np.ndarray, " w"], float]]:
    """Which dimensions are changes of a rotation each, and the radians of their unit."""
    found = [i for i, dim in enumerate(dims) if dim.kind == "ee_rotation" and dim.mode == "delta"]
    if not found or rotation == "sum":
        return []
    names = ", ".join(dims[i].name for i in found)
    if rotation is None:
        raise LibrobotError(
            f"{place}: data.stride: the actions {names} are changes of a rotation, and several turns are no "
            f"sum of numbers; say what they are: data.stride_rotation=axis_angle | euler | quaternion | "
            f"rot6d, or sum, which is right for small turns"
        )
    width = WIDTHS[rotation]
    if len(found) % width:
        raise LibrobotError(
            f"{place}: data.stride_rotation={rotation} has {width} numbers for each rotation, found "
            f"{len(found)} dimensions that are changes of one: {names}"
        )
    angles = rotation in ("axis_angle", "euler")
    unknown = [dims[i].name for i in found if angles and dims[i].unit not in UNITS]
    if unknown:
        raise LibrobotError(
            f"{place}: data.stride_rotation={rotation} needs angles in rad or deg, found the unit "
            f"{dims[found[0]].unit!r} for {', '.join(unknown)}; take data.stride_rotation=sum"
        )
    groups = np.array(found).reshape(-1, width)
    return [(group, UNITS[dims[group[0]].unit] if angles else 1.0) for group in groups]


def _composed(
    changes: Float[np.ndarray, "n t w"], real: Bool[np.ndarray, "n t"], kind: str
) -> Float[np.ndarray, "n w"]:
    """One turn after another, without those that are not real."""
    exact = torch.from_numpy(changes.astype(np.float64))
    each = to_matrix(exact, kind)  # type: ignore[arg-type]
    whole = torch.eye(3, dtype=each.dtype).expand(len(each), 3, 3)
    for turn, happens in zip(each.unbind(1), torch.from_numpy(real).unbind(1), strict=True):
        whole = torch.where(happens[:, None, None], turn @ whole, whole)
    made = from_matrix(whole, kind)  # type: ignore[arg-type]
    # Of numbers that are one rotation, those that go on where the first turn points to.
    return nearest(made, exact[:, 0], kind).numpy()  # type: ignore[arg-type]
