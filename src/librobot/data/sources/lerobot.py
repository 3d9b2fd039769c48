"""LeRobotDataset v3.0, read directly from its parquet and mp4 files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int, UInt8

from librobot.data import format as v3
from librobot.data.frame_cache import FrameCache, fingerprint
from librobot.data.images import resize_with_padding
from librobot.data.metadata import read_metadata
from librobot.data.sources.base import CacheMode
from librobot.data.statistics import vector_statistics
from librobot.data.tables import ImageColumn, read_columns
from librobot.data.video_column import VideoColumn
from librobot.errors import LibrobotError, nearest
from librobot.types import Camera, Dim, RobotSpec


class Column(Protocol):
    """A camera's frames as stored."""

    def read(self, rows: Int[np.ndarray, " n"]) -> list[UInt8[np.ndarray, "h w 3"]]:
        """The frames of ascending `rows`."""


class LeRobotSource:
    """A LeRobotDataset v3.0 folder, its states and actions in memory, its images read when asked for.

    cameras, image_size, cache: see `SourceFactory`. cache_dir: where cache="memmap" keeps raw pixels (default
    $LIBROBOT_CACHE/frames or ~/.cache/librobot/frames). state_key, action_key: the features to use; a dataset
    without `state_key` has a state of no dimensions. prompt_key: "task" for the dataset's instructions, or a
    text column of the data files.

    Where the dataset carries meta/librobot.json the robot's spec is read from it; else it is made of the
    features' names, with unknown units, and cameras named as after `observation.images.`.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        cameras: Sequence[str] | None = None,
        image_size: Sequence[int] | None = None,
        cache: CacheMode = "none",
        cache_dir: str | Path | None = None,
        state_key: str = v3.STATE,
        action_key: str = v3.ACTION,
        prompt_key: str = v3.TASK,
    ) -> None:
        if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
            raise ValueError(f"image_size must be [height, width] in pixels or null, found {image_size}")
        if cache not in ("none", "memmap"):
            raise ValueError(f"cache must be none or memmap, found {cache!r}")
        self.root = Path(root).expanduser().absolute()
        self.metadata = read_metadata(self.root)
        self.image_size = (int(image_size[0]), int(image_size[1])) if image_size is not None else None
        self.episode_lengths = self.metadata.lengths.astype(np.int64)
        self._camera_keys = self._choose_cameras(cameras)
        self._read_vectors(state_key, action_key, prompt_key)
        self.spec = self._read_spec(state_key, action_key)
        self.provenance = self._provenance()
        self._columns: dict[str, Column] = {
            name: self._column(key) for name, key in self._camera_keys.items()
        }
        self._cached: dict[str, FrameCache] = {}
        if cache == "memmap":
            self._cached = self._build_cache(Path(cache_dir or default_cache_dir() / "frames").expanduser())

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
                    f"{self.root}: frame {rows[i]}: {self._camera_keys[camera]}: expected {size.height} x "
                    f"{size.width} pixels (meta/info.json), found {image.shape[0]} x {image.shape[1]}; set "
                    "image_size"
                )
            out[i] = image.transpose(2, 0, 1)
        return out

    def _choose_cameras(self, cameras: Sequence[str] | None) -> dict[str, str]:
        """Camera name -> feature, in the dataset's order."""
        features = self.metadata.features
        found = {v3.camera_name(key): key for key, feature in features.items() if v3.is_camera(feature)}
        for name in cameras or ():
            if name not in found:
                raise LibrobotError(f"{self.root}: no camera {name!r} in the dataset; {nearest(name, found)}")
        return {name: key for name, key in found.items() if cameras is None or name in cameras}

    def _read_vectors(self, state_key: str, action_key: str, prompt_key: str) -> None:
        features, total = self.metadata.features, int(self.episode_lengths.sum())
        if action_key not in features:
            raise LibrobotError(
                f"{self.root / v3.INFO}: the dataset has no action column {action_key!r}; "
                f"{nearest(action_key, features)}. Name another one with data.source.action_key"
            )
        vectors = [key for key in (state_key, action_key) if key in features]
        for key in vectors:
            if len(features[key]["shape"]) != 1:
                raise LibrobotError(
                    f"{self.root / v3.INFO}: {key}: expected a vector, found shape {features[key]['shape']}"
                )
        if prompt_key != v3.TASK and prompt_key not in features:
            raise LibrobotError(
                f"{self.root / v3.INFO}: no text column {prompt_key!r}; "
                f"{nearest(prompt_key, [v3.TASK, *features])}"
            )
        prompt_column = "task_index" if prompt_key == v3.TASK else prompt_key
        columns = read_columns(self.metadata, [*vectors, prompt_column])
        for key in vectors:
            size = int(features[key]["shape"][0])
            values = columns[key].reshape(total, -1).astype(np.float32, copy=False)
            if values.shape[1] != size:
                raise LibrobotError(
                    f"{self.root}: {key}: expected {size} dimensions (meta/info.json), found "
                    f"{values.shape[1]}"
                )
            columns[key] = values
            self._check_finite(key, values)
        self._actions = columns[action_key]
        self._states = columns[state_key] if state_key in vectors else np.zeros((total, 0), np.float32)
        if prompt_key == v3.TASK:
            self._prompts, self._prompt_of_row = self.metadata.tasks, columns[prompt_column]
            if self._prompt_of_row.min() < 0 or self._prompt_of_row.max() >= len(self._prompts):
                raise LibrobotError(
                    f"{self.root}: task_index goes to {self._prompt_of_row.max()}, but {v3.TASKS} holds "
                    f"{len(self._prompts)} instructions"
                )
        else:
            texts, self._prompt_of_row = np.unique(columns[prompt_column].astype(str), return_inverse=True)
            self._prompts = [str(text) for text in texts]

    def _check_finite(self, key: str, values: Float[np.ndarray, "n dim"]) -> None:
        if np.isfinite(values).all():
            return
        bad = np.argwhere(~np.isfinite(values))
        row, dim = bad[0]
        ends = np.cumsum(self.episode_lengths)
        episode = int(np.searchsorted(ends, row, side="right"))
        path = next(path for path, episodes in self.metadata.data_files() if episode in episodes)
        frame = int(row - ends[episode] + self.episode_lengths[episode])
        name = v3.dimension_names(self.metadata.features[key], key)[dim]
        raise LibrobotError(
            f"{path}: episode {episode}, frame {frame}: {key} dimension {name!r} is {values[row, dim]}; "
            f"every value must be finite ({len(bad)} are not). Remove the episode or record it again"
        )

    def _read_spec(self, state_key: str, action_key: str) -> RobotSpec:
        features = self.metadata.features
        cameras = []
        for name, key in self._camera_keys.items():
            height, width = self.image_size or v3.image_height_width(features[key])
            cameras.append(Camera(name, height, width))
        if described := self.metadata.librobot.get("spec"):
            try:
                spec = RobotSpec.from_dict(described)
            except (TypeError, ValueError) as error:
                raise LibrobotError(
                    f"{self.root / v3.LIBROBOT}: spec: expected what RobotSpec.to_dict gives: {error}. "
                    "Remove the key, and the robot is read from meta/info.json"
                ) from error
            for what, found, expected in (
                ("state", self._states.shape[1], spec.state_dim),
                ("action", self._actions.shape[1], spec.action_dim),
            ):
                if found != expected:
                    raise LibrobotError(
                        f"{self.root / v3.LIBROBOT}: the spec has {expected} {what} dimensions, the data "
                        f"{found}"
                    )
            return replace(spec, cameras=tuple(cameras))
        state = v3.dimension_names(features[state_key], "state") if state_key in features else []
        action = v3.dimension_names(features[action_key], "action")
        return RobotSpec(
            name=str(self.metadata.info.get("robot_type") or "unknown"),
            cameras=tuple(cameras),
            state=tuple(Dim(name) for name in state),
            action=tuple(Dim(name) for name in action),
            control_hz=self.metadata.fps,
        )

    def _provenance(self) -> dict[str, Any]:
        described = {key: value for key, value in self.metadata.librobot.items() if key != "spec"}
        return {
            "renderer": None,
            "env": None,
            **described,
            "root": str(self.root),
            "format": f"lerobot {self.metadata.info['codebase_version']}",
            "episodes": len(self.episode_lengths),
            "frames": int(self.episode_lengths.sum()),
        }

    def _column(self, key: str) -> Column:
        kind = VideoColumn if self.metadata.features[key]["dtype"] == "video" else ImageColumn
        return kind(self.metadata, key)

    def _build_cache(self, folder: Path) -> dict[str, FrameCache]:
        folder = folder / fingerprint(self.metadata, self.image_size)
        total = int(self.episode_lengths.sum())
        caches = {
            camera.name: FrameCache(folder, camera.name, (total, 3, camera.height, camera.width))
            for camera in self.spec.cameras
        }
        FrameCache.build(list(caches.values()), self.decode)
        return caches


def default_cache_dir() -> Path:
    """$LIBROBOT_CACHE, else ~/.cache/librobot."""
    return Path(os.environ.get("LIBROBOT_CACHE") or "~/.cache/librobot").expanduser()
