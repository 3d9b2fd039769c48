"""Zarr: the replay buffer of Diffusion Policy (diffusion_policy/common/replay_buffer.py).

data/<key>          one array per key, all steps of all episodes on the first axis
meta/episode_ends   where each episode ends
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from librobot.data.remote import local_root
from librobot.data.sources.base import Cache, OnError
from librobot.data.sources.stored import Column, Episodes, StoredSource, join_prompts
from librobot.data.sources.zarr_files import ZarrArray, ZarrStore
from librobot.errors import LibrobotError, nearest
from librobot.types import Camera, Dim, RobotSpec

ATTRIBUTE = "librobot"
"""Where our writer leaves the robot's spec and the instructions, in the root's attributes."""


class ZarrSource(StoredSource):
    """A replay buffer: a .zarr folder or a zip of one, Zarr v2.

    state, action: the keys of data/, joined in this order; state None: "state" where there is one.
    pictures: camera -> key; None:
    every key of data/ with the shape (n, h, w, 3) or (n, 3, h, w). Pictures of floating-point numbers hold
    0 to 255, as the Push-T data does. prompt: the instruction; None: the stored ones, else the folder's name.
    robot, control_hz: the buffer does not say.

    Raises LibrobotError, by array, for missing keys, lengths that differ and damaged chunks.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        state: Sequence[str] | None = None,
        action: Sequence[str] = ("action",),
        pictures: Mapping[str, str] | None = None,
        cameras: Sequence[str] | None = None,
        image_size: Sequence[int] | None = None,
        cache: Cache = "none",
        cache_dir: str | Path | None = None,
        prompt: str | None = None,
        robot: str | None = None,
        control_hz: float | None = None,
        on_error: OnError = "raise",
    ) -> None:
        root = local_root(root)
        self.store = ZarrStore(root)
        keys = self.store.arrays("data")
        if state is None:
            state = [key for key in ("state",) if key in keys]
        ends = ZarrArray(self.store, "meta/episode_ends").all().astype(np.int64)
        lengths = np.diff(ends, prepend=0)
        if not len(ends) or (lengths < 1).any():
            bad = int(np.flatnonzero(lengths < 1)[0]) if len(ends) else 0
            raise LibrobotError(
                f"{root}: meta/episode_ends: expected ascending ends of episodes, found {ends[:8]} (episode "
                f"{bad})"
            )
        arrays = {key: self._array(key, keys, int(ends[-1])) for key in (*state, *action)}
        states = self._vectors([arrays[key] for key in state], int(ends[-1]))
        actions = self._vectors([arrays[key] for key in action], int(ends[-1]))
        if pictures is None:
            pictures = {key: key for key in keys if _holds_pictures(ZarrArray(self.store, f"data/{key}"))}
        columns: dict[str, Column] = {
            name: ZarrColumn(self._array(key, keys, int(ends[-1]))) for name, key in pictures.items()
        }
        attributes = (self.store.json(".zattrs") or {}).get(ATTRIBUTE, {})
        instructions = [root.stem.replace("_", " ")] * len(lengths)
        if stored := attributes.get("instructions"):
            instructions = list(stored)[: len(lengths)]
        prompts, prompt_of_row = join_prompts([prompt or each for each in instructions], lengths)
        described = RobotSpec.from_dict(attributes["spec"]) if "spec" in attributes else None
        spec = RobotSpec(
            name=robot or (described.name if described else "unknown"),
            cameras=tuple(Camera(name, *column.size) for name, column in columns.items()),  # type: ignore[attr-defined]
            state=described.state if described else _dims(state, arrays),
            action=described.action if described else _dims(action, arrays),
            control_hz=control_hz or (described.control_hz if described else 10.0),
        )
        super().__init__(
            Episodes(
                root=root,
                spec=spec,
                lengths=lengths,
                states=states,
                actions=actions,
                prompts=prompts,
                prompt_of_row=prompt_of_row,
                columns=columns,
                files=[
                    path
                    for path in (root, root / "data", *(root / f"data/{k}" for k in keys))
                    if path.exists()
                ],
                places=[f"{root}"] * len(lengths),
                provenance={"format": "zarr"},
                names=(" + ".join(state), " + ".join(action)),
            ),
            cameras=cameras,
            image_size=image_size,
            cache=cache,
            cache_dir=cache_dir,
            described=dict(pictures),
            on_error=on_error,
        )

    def _array(self, key: str, keys: Sequence[str], total: int) -> ZarrArray:
        if key not in keys:
            raise LibrobotError(
                f"{self.store.root}: no array data/{key}; {nearest(key, keys)}. Name the keys with "
                "data.source.state, action and pictures"
            )
        array = ZarrArray(self.store, f"data/{key}")
        if len(array) < total:  # longer: steps of an episode that was being added
            raise LibrobotError(
                f"{self.store.root}: data/{key}: expected {total} steps (meta/episode_ends), found "
                f"{len(array)}"
            )
        return array

    def _vectors(self, arrays: Sequence[ZarrArray], total: int) -> np.ndarray:
        parts = []
        for array in arrays:
            if len(array.shape) > 2 or array.dtype.kind not in "fiub":
                raise LibrobotError(
                    f"{self.store.root}: {array.name}: expected a vector for each step, found {array.dtype} "
                    f"{array.shape}"
                )
            values = array.read(np.arange(total))
            parts.append(values.reshape(total, -1).astype(np.float32))
        return np.concatenate(parts, axis=1) if parts else np.zeros((total, 0), np.float32)


class ZarrColumn:
    """One camera: pictures (n, h, w, 3) or (n, 3, h, w), uint8 or floating point in [0, 255]."""

    def __init__(self, array: ZarrArray) -> None:
        if not _holds_pictures(array):
            raise LibrobotError(
                f"{array.store.root}: {array.name}: expected pictures (n, h, w, 3) or (n, 3, h, w), found "
                f"{array.dtype} {array.shape}"
            )
        self.array, self.channels_last = array, array.shape[3] == 3
        if array.dtype.kind == "f":
            first = array.read(np.arange(min(8, len(array))))
            if first.min() < 0 or not 1 < first.max() <= 255:
                raise LibrobotError(
                    f"{array.store.root}: {array.name}: pictures of {array.dtype} must hold 0 to 255, found "
                    f"{first.min():g} to {first.max():g} in the first; write them as uint8"
                )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.array.shape[1:3] if self.channels_last else self.array.shape[2:4]

    def read(self, rows: Int[np.ndarray, " n"]) -> list[UInt8[np.ndarray, "h w 3"]]:
        images = self.array.read(rows)
        if images.dtype != np.uint8:
            images = images.round().clip(0, 255).astype(np.uint8)
        return list(images if self.channels_last else images.transpose(0, 2, 3, 1))


def _holds_pictures(array: ZarrArray) -> bool:
    shape = array.shape
    return (
        len(shape) == 4 and 3 in (shape[1], shape[3]) and (array.dtype == np.uint8 or array.dtype.kind == "f")
    )


def _dims(keys: Sequence[str], arrays: Mapping[str, ZarrArray]) -> tuple[Dim, ...]:
    sizes = {key: arrays[key].shape[1] if len(arrays[key].shape) > 1 else 1 for key in keys}
    return tuple(Dim(f"{key}_{i}") for key in keys for i in range(sizes[key]))
