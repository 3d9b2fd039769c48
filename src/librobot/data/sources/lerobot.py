"""LeRobotDataset v3.0, v2.1 and v2.0, read directly from their parquet and mp4 files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from librobot.data import format as v3
from librobot.data.frame_cache import dataset_files
from librobot.data.metadata import read_metadata
from librobot.data.remote import RemoteFolder, is_remote, local_root
from librobot.data.sources.base import Cache, OnError
from librobot.data.sources.stored import Column, Episodes, StoredSource, check_options, without
from librobot.data.tables import ImageColumn, read_columns
from librobot.data.video_column import VideoColumn
from librobot.errors import LibrobotError, nearest
from librobot.types import Camera, Dim, RobotSpec


class LeRobotSource(StoredSource):
    """A LeRobotDataset folder: v3.0, or v2.x with files for every episode.

    root: a folder, or an fsspec address (s3://, gs://, hf://, ...): its tables are copied when it is opened,
    videos when they are first read, at most `local_cache_gb` of them (None: no limit).
    cameras, image_size, cache, cache_dir, on_error: see `StoredSource`. state_key, action_key: the
    features to use; a dataset without `state_key` has a state of no dimensions. prompt_key: "task" for the
    dataset's instructions, or a text column of the data files.

    Where the dataset carries meta/librobot.json the robot's spec is read from it; else it is made of the
    features' names, with unknown units, and cameras named as after `observation.images.`.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        cameras: Sequence[str] | None = None,
        image_size: Sequence[int] | None = None,
        cache: Cache = "none",
        cache_dir: str | Path | None = None,
        state_key: str = v3.STATE,
        action_key: str = v3.ACTION,
        prompt_key: str = v3.TASK,
        on_error: OnError = "raise",
        local_cache_gb: float | None = None,
    ) -> None:
        check_options(image_size, cache)
        self._remote = RemoteFolder(str(root), local_cache_gb) if is_remote(root) else None
        if self._remote is None:
            self.root = local_root(root)
        else:
            self.root = self._remote.local
            self._remote.fetch_all(lambda name: not name.startswith("videos/"))
        self.metadata = read_metadata(self.root)
        self._camera_keys = self._choose_cameras(cameras)
        states, actions, prompts, prompt_of_row = self._read_vectors(state_key, action_key, prompt_key)
        spec = self._read_spec(state_key, action_key, states.shape[1], actions.shape[1])
        episodes = Episodes(
            root=self.root,
            spec=spec,
            lengths=self.metadata.lengths,
            states=states,
            actions=actions,
            prompts=prompts,
            prompt_of_row=prompt_of_row,
            columns={name: self._column(key) for name, key in self._camera_keys.items()},
            files=dataset_files(self.metadata) if self._remote is None else (),
            places=self._places_of_episodes(),
            provenance=self._description(),
            names=(state_key, action_key),
        )
        problems: dict[int, str] = {}
        for column in episodes.columns.values():
            problems |= getattr(column, "problems", {})
        super().__init__(
            without(episodes, problems, on_error),
            image_size=image_size,
            cache=cache,
            cache_dir=cache_dir,
            described=[
                self.metadata.info,
                sorted(problems),
                self._remote and sorted(self._remote.files.items()),
            ],
            on_error=on_error,
        )

    def _places_of_episodes(self) -> list[str]:
        places = [""] * len(self.metadata.lengths)
        for path, episodes in self.metadata.data_files():
            for episode in episodes:
                places[episode] = str(path)
        return places

    def _choose_cameras(self, cameras: Sequence[str] | None) -> dict[str, str]:
        """Camera name -> feature, in the dataset's order."""
        features = self.metadata.features
        found = {v3.camera_name(key): key for key, feature in features.items() if v3.is_camera(feature)}
        for name in cameras or ():
            if name not in found:
                raise LibrobotError(f"{self.root}: no camera {name!r} in the dataset; {nearest(name, found)}")
        return {name: key for name, key in found.items() if cameras is None or name in cameras}

    def _read_vectors(
        self, state_key: str, action_key: str, prompt_key: str
    ) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
        """States, actions, instructions, and which instruction each row has."""
        features, total = self.metadata.features, int(self.metadata.lengths.sum())
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
        actions = columns[action_key]
        states = columns[state_key] if state_key in vectors else np.zeros((total, 0), np.float32)
        if prompt_key != v3.TASK:
            texts, which = np.unique(columns[prompt_column].astype(str), return_inverse=True)
            return states, actions, [str(text) for text in texts], which.reshape(-1)
        prompts, which = self.metadata.tasks, columns[prompt_column]
        if which.min() < 0 or which.max() >= len(prompts):
            raise LibrobotError(
                f"{self.root}: task_index goes to {which.max()}, but its table holds {len(prompts)} "
                "instructions"
            )
        return states, actions, prompts, which

    def _read_spec(self, state_key: str, action_key: str, state_dim: int, action_dim: int) -> RobotSpec:
        features = self.metadata.features
        cameras = []
        for name, key in self._camera_keys.items():
            height, width = v3.image_height_width(features[key])
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
                ("state", state_dim, spec.state_dim),
                ("action", action_dim, spec.action_dim),
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

    def _description(self) -> dict[str, Any]:
        described = {key: value for key, value in self.metadata.librobot.items() if key != "spec"}
        return described | {"format": f"lerobot {self.metadata.info['codebase_version']}"}

    def _column(self, key: str) -> Column:
        if self.metadata.features[key]["dtype"] != "video":
            return ImageColumn(self.metadata, key)
        return VideoColumn(self.metadata, key, self._remote.fetch if self._remote is not None else None)
