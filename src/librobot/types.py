"""The whole data contract: what a robot is, what it observes, what a batch holds.

Shape letters, the same in every file of librobot:

    b  batch                 k  chunk (action horizon)     l  tokens
    t  observation steps     a  action dimensions          d  width
    c h w  image             s  state dimensions           n  cameras

This module imports no torch at run time, so that simulators and robot drivers can use `RobotSpec`
in processes that never load it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from jaxtyping import Bool, Float, Int, UInt8
    from torch import Tensor

DimKind = Literal["joint", "ee_position", "ee_rotation", "gripper", "base", "other"]


@dataclass(frozen=True)
class Dim:
    """One dimension of a state or action vector.

    `unit` is the physical unit ("rad", "m", "deg", "" where unknown); `mode` says whether an action is an
    absolute target or a change from the current value; `low` and `high` are limits in `unit`.
    """

    name: str
    unit: str = ""
    kind: DimKind = "other"
    mode: Literal["absolute", "delta"] = "absolute"
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Camera:
    """A camera and the size of the images that it delivers, in pixels."""

    name: str
    height: int
    width: int


@dataclass(frozen=True)
class RobotSpec:
    """What a policy has to know of a robot (the `robot=` group). Holds plain values only.

    `control_hz` is the rate at which actions are executed, in 1/s.
    """

    name: str
    cameras: tuple[Camera, ...]
    state: tuple[Dim, ...]
    action: tuple[Dim, ...]
    control_hz: float

    def __post_init__(self) -> None:
        for attribute, kind in (("cameras", Camera), ("state", Dim), ("action", Dim)):
            items = tuple(x if isinstance(x, kind) else kind(**x) for x in getattr(self, attribute))
            object.__setattr__(self, attribute, items)
            names = [x.name for x in items]
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(f"robot {self.name!r}: {attribute} names must differ, found {twice} twice")
        if not self.action:
            raise ValueError(f"robot {self.name!r}: needs at least one action dimension, found none")
        if not self.control_hz > 0:
            raise ValueError(f"robot {self.name!r}: control_hz must be above 0, found {self.control_hz}")

    @property
    def camera_names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.cameras)

    @property
    def state_dim(self) -> int:
        return len(self.state)

    @property
    def action_dim(self) -> int:
        return len(self.action)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only: safe in JSON and in a `weights_only` checkpoint."""
        plain = asdict(self)
        return plain | {key: list(plain[key]) for key in ("cameras", "state", "action")}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> RobotSpec:
        return cls(**plain)

    def with_cameras(self, names: Sequence[str]) -> RobotSpec:
        """The same robot with only the named cameras, in the robot's own order."""
        return replace(self, cameras=tuple(c for c in self.cameras if c.name in names))


@dataclass
class Observation:
    """What a policy sees. Images are uint8 in [0, 255], state is in physical units.

    `image_mask` is False where a sample lacks that camera (its pixels are then zeros). `inputs` is what the
    backbone's processor made of the observation (token ids and masks), normally in a data worker; None
    means that the framework calls the processor itself. `embodiment` numbers each sample's robot among those
    that the policy knows; None where all are the first. A robot with fewer dimensions or cameras than the
    widest is padded with zeros. `goal_images` show the scene as it shall be, by camera, for frameworks that
    read goals; a sample without one is all black.
    """

    images: dict[str, UInt8[Tensor, "b t c h w"]]
    image_mask: dict[str, Bool[Tensor, " b"]]
    state: Float[Tensor, "b t s"]
    prompt: list[str]
    inputs: dict[str, Tensor] | None = None
    embodiment: Int[Tensor, " b"] | None = None
    goal_images: dict[str, UInt8[Tensor, "b c h w"]] | None = None

    @property
    def batch_size(self) -> int:
        return len(self.prompt)

    def to(self, device: torch.device | str, **kwargs: Any) -> Observation:
        return _to(self, device, **kwargs)


@dataclass
class Batch:
    """A training batch. Plain, not frozen: Lightning's bf16-true precision replaces its fields.

    `actions` are in physical units; `action_mask` is False past the episode's end.
    """

    observation: Observation
    actions: Float[Tensor, "b k a"]
    action_mask: Bool[Tensor, "b k"]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        return self.observation.batch_size

    @property
    def embodiment(self) -> Int[Tensor, " b"] | None:
        return self.observation.embodiment

    def to(self, device: torch.device | str, **kwargs: Any) -> Batch:
        return _to(self, device, **kwargs)


def _to(value: Any, device: Any, **kwargs: Any) -> Any:
    """A copy of `value` with every tensor in it moved to `device`."""
    if hasattr(value, "to") and not is_dataclass(value):
        return value.to(device, **kwargs)
    if is_dataclass(value) and not isinstance(value, type):
        moved = {f.name: _to(getattr(value, f.name), device, **kwargs) for f in fields(value)}
        return replace(value, **moved)
    if isinstance(value, dict):
        return {key: _to(item, device, **kwargs) for key, item in value.items()}
    return value
