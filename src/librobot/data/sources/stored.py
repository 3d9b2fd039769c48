"""What the sources of all formats share once their files are understood: vectors in memory, images by row."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int, UInt8

from librobot.data.frame_cache import FrameCache, file_fingerprint
from librobot.data.images import resize_with_padding
from librobot.data.sources.base import CacheMode
from librobot.data.statistics import vector_statistics
from librobot.errors import LibrobotError, nearest
from librobot.types import RobotSpec


class Column(Protocol):
    """A camera's frames as stored."""

    def read(self, rows: Int[np.ndarray, " n"]) -> list[UInt8[np.ndarray, "h w 3"]]:
        """The frames of ascending `rows`."""


@dataclass
class Episodes:
    """The content of a dataset, in the order of its rows.

    states (n, s) and actions (n, a) are float32; prompt_of_row (n,) indexes `prompts`; columns: one for each
    camera of `spec`, which gives the stored sizes. files: what the pixels depend on, by whose sizes and times
    a frame cache knows that it is still theirs. For errors: place(episode) names where an episode lies,
    `names` what the files call state and action.
    """

    root: Path
    spec: RobotSpec
    lengths: Int[np.ndarray, " e"]
    states: Float[np.ndarray, "n s"]
    actions: Float[np.ndarray, "n a"]
    prompts: Sequence[str]
    prompt_of_row: Int[np.ndarray, " n"]
    columns: Mapping[str, Column]
    files: Sequence[Path]
    place: Callable[[int], str]
    provenance: Mapping[str, Any]
    names: tuple[str, str] = ("state", "action")


class StoredSource:
    """A `Source` over `Episodes`. cameras, image_size, cache: see `SourceFactory`; cache_dir: where
    cache="memmap" keeps raw pixels (default $LIBROBOT_CACHE/frames or ~/.cache/librobot/frames).

    Raises LibrobotError for values that are not finite, by file, episode and frame.
    """

    def __init__(
        self,
        episodes: Episodes,
        *,
        cameras: Sequence[str] | None = None,
        image_size: Sequence[int] | None = None,
        cache: CacheMode = "none",
        cache_dir: str | Path | None = None,
        fingerprint: str | None = None,
    ) -> None:
        check_options(image_size, cache)
        spec = episodes.spec
        for name in cameras or ():
            if name not in spec.camera_names:
                raise LibrobotError(
                    f"{episodes.root}: no camera {name!r} in the dataset; {nearest(name, spec.camera_names)}"
                )
        if cameras is not None:
            spec = spec.with_cameras(cameras)
        self.image_size = (int(image_size[0]), int(image_size[1])) if image_size is not None else None
        if self.image_size is not None:
            height, width = self.image_size
            sized = tuple(replace(camera, height=height, width=width) for camera in spec.cameras)
            spec = replace(spec, cameras=sized)
        self.root, self.spec = episodes.root, spec
        self.episode_lengths = episodes.lengths.astype(np.int64)
        self._states, self._actions = episodes.states, episodes.actions
        self._prompts, self._prompt_of_row = list(episodes.prompts), episodes.prompt_of_row
        self._place = episodes.place
        self._columns = {name: episodes.columns[name] for name in spec.camera_names}
        self.provenance: dict[str, Any] = {
            "renderer": None,
            "env": None,
            **episodes.provenance,
            "root": str(self.root),
            "episodes": len(self.episode_lengths),
            "frames": int(self.episode_lengths.sum()),
        }
        self._check_finite(episodes.names[0], self._states, [dim.name for dim in spec.state])
        self._check_finite(episodes.names[1], self._actions, [dim.name for dim in spec.action])
        self._cached: dict[str, FrameCache] = {}
        if cache == "memmap" and spec.cameras:
            folder = Path(cache_dir or default_cache_dir() / "frames").expanduser()
            name = fingerprint or file_fingerprint(episodes.files, [str(self.root), self.image_size])
            self._cached = self._build_cache(folder / name)

    def states(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n s"]:
        return self._states[rows]

    def actions(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n a"]:
        return self._actions[rows]

    def prompts(self, rows: Int[np.ndarray, " n"]) -> list[str]:
        return [self._prompts[i] for i in self._prompt_of_row[rows]]

    def images(self, rows: Int[np.ndarray, " n"]) -> dict[str, UInt8[np.ndarray, "n c h w"]]:
        if self._cached:
            return {name: cache.read(rows) for name, cache in self._cached.items()}
        ascending, back = np.unique(rows, return_inverse=True)  # a window repeats its first frame
        return {name: self.decode(name, ascending)[back.reshape(-1)] for name in self._columns}

    def statistics(self) -> dict[str, dict[str, Float[np.ndarray, " dim"]]]:
        return {"state": vector_statistics(self._states), "action": vector_statistics(self._actions)}

    def decode(self, camera: str, rows: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n c h w"]:
        """The frames of ascending `rows`, decoded and resized, past any cache."""
        size = next(c for c in self.spec.cameras if c.name == camera)
        out = np.empty((len(rows), 3, size.height, size.width), np.uint8)
        for i, image in enumerate(self._columns[camera].read(rows)):
            if self.image_size is not None:
                image = resize_with_padding(image, *self.image_size)
            if image.shape[:2] != (size.height, size.width):
                raise LibrobotError(
                    f"{self._at(int(rows[i]))}: camera {camera}: expected {size.height} x {size.width} "
                    f"pixels, found {image.shape[0]} x {image.shape[1]}; set image_size"
                )
            out[i] = image.transpose(2, 0, 1)
        return out

    def _at(self, row: int) -> str:
        ends = np.cumsum(self.episode_lengths)
        episode = int(np.searchsorted(ends, row, side="right"))
        frame = row - int(ends[episode]) + int(self.episode_lengths[episode])
        return f"{self._place(episode)}: episode {episode}, frame {frame}"

    def _check_finite(self, key: str, values: Float[np.ndarray, "n dim"], names: Sequence[str]) -> None:
        if np.isfinite(values).all():
            return
        bad = np.argwhere(~np.isfinite(values))
        row, dim = bad[0]
        raise LibrobotError(
            f"{self._at(int(row))}: {key} dimension {names[dim]!r} is {values[row, dim]}; every value must "
            f"be finite ({len(bad)} are not). Remove the episode or record it again"
        )

    def _build_cache(self, folder: Path) -> dict[str, FrameCache]:
        total = int(self.episode_lengths.sum())
        caches = {
            camera.name: FrameCache(folder, camera.name, (total, 3, camera.height, camera.width))
            for camera in self.spec.cameras
        }
        FrameCache.build(list(caches.values()), self.decode)
        return caches


def check_options(image_size: Sequence[int] | None, cache: CacheMode) -> None:
    """Raise ValueError for what no source takes."""
    if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
        raise ValueError(f"image_size must be [height, width] in pixels or null, found {image_size}")
    if cache not in ("none", "memmap"):
        raise ValueError(f"cache must be none or memmap, found {cache!r}")


def default_cache_dir() -> Path:
    """$LIBROBOT_CACHE, else ~/.cache/librobot."""
    return Path(os.environ.get("LIBROBOT_CACHE") or "~/.cache/librobot").expanduser()
