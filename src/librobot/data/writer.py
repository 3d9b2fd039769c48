"""Writing LeRobotDataset v3.0 episode by episode, so that a killed recording keeps every complete episode."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from librobot.data import format as v3
from librobot.data.consolidate import INFO_ASIDE, consolidate, read_complete_info
from librobot.data.episode_writer import fitting
from librobot.data.files import remove_temporaries, write_json
from librobot.data.metadata import STAGING
from librobot.data.staging import StagedEpisode, stage_episode, staged_episodes
from librobot.errors import LibrobotError
from librobot.types import Dim, RobotSpec

SETTINGS = f"{STAGING}/writer.json"


class LeRobotWriter:
    """Writes what lerobot 0.6 and librobot read.

    `add_episode` puts a whole episode on disk before it returns; `finalize` (or leaving the `with` block
    without an error) puts the staged episodes together into the format's files. After that more may be added,
    into new files. `resume=True` goes on with whatever is at `root`: staged episodes, a complete dataset, or
    nothing.

    image_format: "image" keeps lossless PNG in the parquet files, "video" encodes AV1 (H.264 where PyAV lacks
    it). metadata: plain values stored beside the spec in meta/librobot.json ("renderer", "env", ...).
    """

    def __init__(
        self,
        root: str | Path,
        spec: RobotSpec,
        *,
        fps: int,
        image_format: Literal["image", "video"] = "image",
        metadata: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        if image_format not in ("image", "video"):
            raise ValueError(f"image_format must be image or video, found {image_format!r}")
        if fps < 1 or int(fps) != fps:
            raise ValueError(f"fps must be a whole number above 0, found {fps}")
        for camera in spec.cameras:
            if not v3.is_feature_name(camera.name):
                raise ValueError(
                    f"camera name {camera.name!r}: only letters, digits, spaces and _-. may be used"
                )
            if image_format == "video" and (camera.height % 2 or camera.width % 2):
                raise ValueError(
                    f"camera {camera.name!r} is {camera.height} x {camera.width}: video needs even sizes; "
                    "use image_format=image"
                )
        self.root = Path(root).expanduser().absolute()
        self.spec, self.fps, self.image_format = spec, int(fps), image_format
        self._description = {"spec": finite_spec(spec), **(metadata or {})}
        try:
            json.dumps(self._description, allow_nan=False)
        except (TypeError, ValueError) as error:  # now, not when the recording is over
            raise ValueError(f"metadata must hold plain finite values: {error}") from error
        self._features: dict[str, dict[str, Any]] | None = None
        self._complete_episodes = self._complete_frames = 0
        self._staged: list[StagedEpisode] = []
        self._open(resume)

    @property
    def num_episodes(self) -> int:
        """Complete episodes on disk, staged or finalised."""
        return self._complete_episodes + len(self._staged)

    def add_episode(
        self,
        *,
        images: Mapping[str, UInt8[np.ndarray, "T h w 3"]],
        state: Float[np.ndarray, "T s"],
        action: Float[np.ndarray, "T a"],
        task: str | Sequence[str],
        extra: Mapping[str, Shaped[np.ndarray, "T *dim"]] | None = None,  # noqa: F821
    ) -> int:
        """Store one episode; its index. When this returns, the episode survives the death of the process.

        task: one instruction, or one for each frame. extra: further columns by feature name
        ("next.reward", ...), the same in every episode. Raises ValueError for arrays that do not fit the
        spec, each other or the earlier episodes, and for values that are not finite.
        """
        episode = fitting(self.spec, images=images, state=state, action=action, task=task)
        if not all(episode.tasks):
            raise ValueError("task must be an instruction, found an empty text")
        arrays = {v3.IMAGES + name: frames for name, frames in episode.images.items()}
        if self.spec.state_dim:
            arrays[v3.STATE] = episode.state
        arrays[v3.ACTION] = episode.action
        for key, value in (extra or {}).items():
            if key in arrays or key in v3.FRAME_FEATURES or not v3.is_feature_name(key):
                raise ValueError(f"extra {key!r}: expected a new name of letters, digits, spaces and _-.")
            arrays[key] = np.asarray(value)
        features = self._features_of(arrays)
        self._check(arrays, features)
        if self._features is None:
            self._features = features
            self._write_settings()
        frames = self._complete_frames + sum(episode.record["length"] for episode in self._staged)
        staged = stage_episode(
            self.root, self.num_episodes, frames, features, arrays, episode.tasks, self.fps
        )
        self._staged.append(staged)
        return staged.index

    def finalize(self) -> None:
        """Make the folder a valid dataset of all episodes. Can be called again, and after it was killed."""
        interrupted = (self.root / INFO_ASIDE).exists() and not (self.root / v3.INFO).exists()
        if self._staged:
            assert self._features is not None
            consolidate(
                self.root,
                self._staged,
                self._features,
                fps=self.fps,
                robot_type=self.spec.name,
                description=self._description,
            )
            self._complete_frames += sum(episode.record["length"] for episode in self._staged)
            self._complete_episodes += len(self._staged)
            self._staged = []
        elif interrupted:
            (self.root / INFO_ASIDE).rename(self.root / v3.INFO)
        if (self.root / v3.INFO).exists():
            shutil.rmtree(self.root / STAGING, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finalize()

    def _open(self, resume: bool) -> None:
        for folder in ("meta", "data", "videos"):  # a reader that globs would take them for parts
            remove_temporaries(self.root / folder)
        info = read_complete_info(self.root)
        staged = staged_episodes(self.root)
        if not resume and (info is not None or staged):
            raise LibrobotError(
                f"{self.root}: holds {info['total_episodes'] if info else 0} complete and {len(staged)} "
                "staged episodes already; give resume=True to go on with them, or another folder"
            )
        settings = self.root / SETTINGS
        if info is not None:
            self._complete_episodes, self._complete_frames = info["total_episodes"], info["total_frames"]
            self._features = {
                key: {name: value for name, value in feature.items() if name != "info"}
                for key, feature in info["features"].items()
            }
            self._expect("format", info.get("codebase_version"), v3.VERSION)
            self._expect("fps", info["fps"], self.fps)
        elif staged and settings.exists():  # without an episode they bind nobody
            stored = json.loads(settings.read_text(encoding="utf-8"))
            self._features = stored["features"]
            self._expect("fps", stored["fps"], self.fps)
        for episode in staged:
            if episode.index < self._complete_episodes:  # finalize was killed while it cleaned up
                episode.remove()
            else:
                self._staged.append(episode)
        if self._features is not None:
            expected = self._spec_features()
            for key, feature in expected.items():
                self._expect(f"feature {key}", self._features.get(key), feature)
            extras = set(self._features) - set(expected)
            if images := sorted(key for key in extras if self._features[key]["dtype"] in ("image", "video")):
                self._expect(f"feature {images[0]}", self._features[images[0]], None)
        self.root.mkdir(parents=True, exist_ok=True)

    def _expect(self, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            raise LibrobotError(
                f"{self.root}: cannot go on with this dataset: its {what} is {found}, this recording's is "
                f"{expected}"
            )

    def _write_settings(self) -> None:
        write_json(self.root / SETTINGS, {"fps": self.fps, "features": self._features})

    def _spec_features(self) -> dict[str, dict[str, Any]]:
        features: dict[str, dict[str, Any]] = {}
        for camera in self.spec.cameras:
            features[v3.IMAGES + camera.name] = {
                "dtype": self.image_format,
                "shape": [camera.height, camera.width, 3],
                "names": ["height", "width", "channels"],
            }
        for key, dims in ((v3.STATE, self.spec.state), (v3.ACTION, self.spec.action)):
            if dims:
                features[key] = {"dtype": "float32", "shape": [len(dims)], "names": _names(dims)}
        return features

    def _features_of(self, arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
        features = self._spec_features()
        extras = {key: v3.vector_feature(value, None) for key, value in arrays.items() if key not in features}
        return features | extras | v3.FRAME_FEATURES

    def _check(self, arrays: Mapping[str, np.ndarray], features: Mapping[str, v3.Feature]) -> None:
        """The extra columns fit the episode, and all columns the earlier episodes."""
        length = len(arrays[v3.ACTION])
        for key in set(arrays) - set(self._spec_features()):
            value, shape = arrays[key], tuple(features[key]["shape"])
            if value.shape != ((length,) if shape == (1,) and value.ndim == 1 else (length, *shape)):
                raise ValueError(f"extra {key!r}: expected shape {(length, *shape)}, found {value.shape}")
            if len(shape) != 1:
                raise ValueError(f"extra {key!r}: expected one value or vector per frame")
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                frame = int(np.argwhere(~np.isfinite(value.reshape(length, -1)))[0, 0])
                raise ValueError(f"extra {key!r}: frame {frame} is not finite")
        if self._features is not None and {**features} != {**self._features}:
            changed = sorted(
                key for key in {*features, *self._features} if features.get(key) != self._features.get(key)
            )
            raise ValueError(
                f"{changed[0]}: every episode must have the same columns; the first episode had "
                f"{self._features.get(changed[0])}, this one has {features.get(changed[0])}"
            )


def _names(dims: tuple[Dim, ...]) -> list[str]:
    return [dim.name for dim in dims]


def finite_spec(spec: RobotSpec) -> dict[str, Any]:
    """The spec as strict JSON: limits that are infinite, which is their default, are left out."""
    plain = spec.to_dict()
    for key in ("state", "action"):
        plain[key] = [
            {
                name: value
                for name, value in dim.items()
                if not (isinstance(value, float) and math.isinf(value))
            }
            for dim in plain[key]
        ]
    return plain
