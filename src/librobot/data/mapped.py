"""A dataset under other names: cameras and dimensions chosen, ordered and renamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from librobot.data.sources.base import Source
from librobot.data.strided import strides_of
from librobot.errors import LibrobotError, nearest
from librobot.types import Dim, RobotSpec

Names = Sequence[str] | Mapping[str, str]
"""Names to keep, in this order; or new name -> the dataset's name."""


class MappedSource:
    """`source` with only the named cameras and dimensions. None keeps all; prompt replaces every
    instruction; robot renames the robot.

    Raises LibrobotError for names that the dataset does not have.
    """

    def __init__(
        self,
        source: Source,
        *,
        cameras: Names | None = None,
        state: Names | None = None,
        action: Names | None = None,
        prompt: str | None = None,
        robot: str | None = None,
    ) -> None:
        self.source, self.prompt = source, prompt
        spec, root = source.spec, source.provenance.get("root", "the dataset")
        self._cameras = _renamed(cameras, spec.camera_names, f"{root}: cameras")
        self._state, state_dims = _chosen(state, spec.state, f"{root}: state")
        self._action, action_dims = _chosen(action, spec.action, f"{root}: action")
        sizes = {camera.name: camera for camera in spec.cameras}
        self.spec = RobotSpec(
            name=robot or spec.name,
            cameras=tuple(replace(sizes[theirs], name=ours) for ours, theirs in self._cameras.items()),
            state=state_dims,
            action=action_dims,
            control_hz=spec.control_hz,
        )
        self.episode_lengths = source.episode_lengths
        self.strides = strides_of(source)
        self.provenance: dict[str, Any] = dict(source.provenance)

    def states(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n s"]:
        return self.source.states(rows)[:, self._state]

    def actions(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n a"]:
        return self.source.actions(rows)[:, self._action]

    def images(self, rows: Int[np.ndarray, " n"]) -> dict[str, UInt8[np.ndarray, "n c h w"]]:
        images = self.source.images(rows)
        return {ours: images[theirs] for ours, theirs in self._cameras.items()}

    def prompts(self, rows: Int[np.ndarray, " n"]) -> list[str]:
        return self.source.prompts(rows) if self.prompt is None else [self.prompt] * len(rows)

    def statistics(self) -> dict[str, dict[str, Float[np.ndarray, " dim"]]]:
        whole = self.source.statistics()
        chosen = {"state": self._state, "action": self._action}
        return {key: {name: v[chosen[key]] for name, v in part.items()} for key, part in whole.items()}


def _renamed(names: Names | None, known: Sequence[str], place: str) -> dict[str, str]:
    """Our name -> theirs."""
    if names is None:
        return {name: name for name in known}
    renamed = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    for name in renamed.values():
        if name not in known:
            raise LibrobotError(f"{place}: none is called {name!r}; {nearest(name, known)}")
    return renamed


def _chosen(names: Names | None, dims: Sequence[Dim], place: str) -> tuple[np.ndarray, tuple[Dim, ...]]:
    """Which dimensions, in which order, and what they are then."""
    known = [dim.name for dim in dims]
    renamed = _renamed(names, known, place)
    index = [known.index(theirs) for theirs in renamed.values()]
    named = zip(renamed, index, strict=True)
    return np.array(index, np.int64), tuple(replace(dims[i], name=ours) for ours, i in named)
