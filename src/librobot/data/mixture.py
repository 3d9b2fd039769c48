"""Several datasets as one: shares, robots with statistics of their own, what one of them lacks padded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from librobot.data.images import resize_with_padding
from librobot.data.mapped import MappedSource
from librobot.data.mixture_order import shares_of
from librobot.data.sources.base import Cache, CacheOptions, OnError, Source, SourceFactory
from librobot.data.statistics import vector_statistics
from librobot.data.strided import StrideRotation, strided, strides_of
from librobot.errors import LibrobotError, nearest
from librobot.types import Camera, Dim, RobotSpec

Statistics = dict[str, dict[str, Float[np.ndarray, " dim"]]]


class MixtureSource:
    """Datasets one after another, under the names of `datasets`.

    datasets: name -> a `Source`, or {"source": a `SourceFactory`, "cameras", "image_size", "cache",
    "cache_build", "cache_limit_gb", "on_error", "stride", "stride_rotation": its own options, over those of
    the mixture (for strides see `with_stride`)}. weights, temperature: see `shares_of`. fields:
    name -> {"cameras", "state", "action", "prompt": see `MappedSource`, "embodiment": the robot's name};
    datasets with the same robot name (default: the dataset's own name) share statistics, and must have the
    same dimensions. state_dim, action_dim: pad to more than the widest robot needs.

    `spec` has every camera (at one size: image_size, else the largest of that name) and the widest robot's
    dimensions; narrower states and actions end in zeros, and a camera that a dataset lacks is black and
    masked.
    """

    def __init__(
        self,
        datasets: Mapping[str, Source | Mapping[str, Any]],
        *,
        weights: Mapping[str, float] | None = None,
        temperature: float = 1.0,
        fields: Mapping[str, Mapping[str, Any]] | None = None,
        state_dim: int | None = None,
        action_dim: int | None = None,
        cameras: Sequence[str] | None = None,
        image_size: Sequence[int] | None = None,
        cache: Cache = "none",
        on_error: OnError = "raise",
    ) -> None:
        if not datasets:
            raise ValueError("a mixture needs at least one dataset")
        for name in fields or {}:
            if name not in datasets:
                raise ValueError(f"fields.{name}: {nearest(name, datasets)}")
        common = {"image_size": image_size, "cache": cache, "on_error": on_error}
        self.names = tuple(datasets)
        self._datasets: dict[str, Source] = {}
        self._options: dict[str, Any] = {"weights": weights, "temperature": temperature, "fields": fields}
        self._options |= {"state_dim": state_dim, "action_dim": action_dim}
        self._options |= {"cameras": cameras, "image_size": image_size}
        robots: list[str] = []
        self.parts: list[Source] = []
        for name, dataset in datasets.items():
            mapping = dict((fields or {}).get(name) or {})
            robots.append(str(mapping.pop("embodiment", name)))
            source = dataset if isinstance(dataset, Source) else _open(dataset, common)
            self._datasets[name] = source
            try:
                self.parts.append(MappedSource(source, **mapping, robot=robots[-1]))
            except TypeError as error:
                known = ("cameras", "state", "action", "prompt", "embodiment")
                wrong = next(key for key in mapping if key not in known)
                raise ValueError(f"fields.{name}.{wrong}: {nearest(wrong, known)}") from error
        sizes = [int(part.episode_lengths.sum()) for part in self.parts]
        self.shares = shares_of(self.names, sizes, weights, temperature)
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.episode_lengths = np.concatenate([part.episode_lengths for part in self.parts])
        self.strides = np.concatenate([strides_of(part) for part in self.parts])
        self.dataset_of_episode = np.repeat(
            np.arange(len(self.parts)), [len(p.episode_lengths) for p in self.parts]
        )
        self._robots = list(dict.fromkeys(robots))
        self.robot_of_dataset = np.array([self._robots.index(robot) for robot in robots])
        sized = _cameras([part.spec for part in self.parts], cameras, image_size)
        self.embodiments = tuple(self._robot(i, sized) for i in range(len(self._robots)))
        self.spec = RobotSpec(
            name=self._robots[0] if len(self._robots) == 1 else "mixture",
            cameras=tuple(sized.values()),
            state=_widest("state", [robot.state for robot in self.embodiments], state_dim),
            action=_widest("action", [robot.action for robot in self.embodiments], action_dim),
            control_hz=self.embodiments[0].control_hz,
        )
        self.provenance: dict[str, Any] = {
            "root": ", ".join(str(part.provenance.get("root")) for part in self.parts),
            "renderer": None,
            "env": None,
            "format": "mixture",
            "datasets": {
                name: {**part.provenance, "share": float(share)}
                for name, part, share in zip(self.names, self.parts, self.shares, strict=True)
            },
        }

    def with_stride(self, stride: int, rotation: StrideRotation | None = None) -> MixtureSource:
        """The same mixture, in which every dataset that has no stride of its own has this one."""
        datasets = {
            name: source if (strides_of(source) > 1).any() else strided(source, stride, rotation)
            for name, source in self._datasets.items()
        }
        return MixtureSource(datasets, **self._options)

    def dataset(self, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Which dataset each row is of."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def embodiment(self, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Which of `embodiments` each row is of."""
        return self.robot_of_dataset[self.dataset(rows)]

    def states(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n s"]:
        return self._padded(rows, self.spec.state_dim, lambda part, own: part.states(own))

    def actions(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n a"]:
        return self._padded(rows, self.spec.action_dim, lambda part, own: part.actions(own))

    def prompts(self, rows: Int[np.ndarray, " n"]) -> list[str]:
        prompts = [""] * len(rows)
        for part, places, own in self._split(rows):
            for place, prompt in zip(places, part.prompts(own), strict=True):
                prompts[place] = prompt
        return prompts

    def images(self, rows: Int[np.ndarray, " n"]) -> dict[str, UInt8[np.ndarray, "n c h w"]]:
        out = {c.name: np.zeros((len(rows), 3, c.height, c.width), np.uint8) for c in self.spec.cameras}
        for part, places, own in self._split(rows):
            for name, frames in part.images(own).items():
                if name in out:
                    out[name][places] = _sized(frames, out[name].shape[2:])
        return out

    def image_masks(self, rows: Int[np.ndarray, " n"]) -> dict[str, Bool[np.ndarray, " n"]]:
        """False where a row's dataset lacks that camera."""
        datasets = self.dataset(rows)
        has = {
            name: np.array([name in part.spec.camera_names for part in self.parts])
            for name in self.spec.camera_names
        }
        return {name: own[datasets] for name, own in has.items()}

    def statistics(self) -> Statistics | list[Statistics]:
        """Those of the robot; a list where there are several, in the order of `embodiments`."""
        each = [self._statistics_of(robot) for robot in range(len(self.embodiments))]
        return each if len(each) > 1 else each[0]

    def _statistics_of(self, robot: int) -> Statistics:
        parts = [part for part, r in zip(self.parts, self.robot_of_dataset, strict=True) if r == robot]
        if len(parts) == 1:
            return parts[0].statistics()
        every = [np.arange(int(part.episode_lengths.sum())) for part in parts]
        return {
            "state": vector_statistics(
                np.concatenate([p.states(r) for p, r in zip(parts, every, strict=True)])
            ),
            "action": vector_statistics(
                np.concatenate([p.actions(r) for p, r in zip(parts, every, strict=True)])
            ),
        }

    def _robot(self, robot: int, sized: Mapping[str, Camera]) -> RobotSpec:
        """The spec of a robot: all its datasets' cameras."""
        chosen = [i for i, r in enumerate(self.robot_of_dataset) if r == robot]
        first, names = self.parts[chosen[0]].spec, set()  # type: RobotSpec, set[str]
        for i in chosen:
            spec = self.parts[i].spec
            names |= set(spec.camera_names)
            for key in ("state", "action"):
                expected, found = ([d.name for d in getattr(s, key)] for s in (first, spec))
                if expected != found:
                    raise LibrobotError(
                        f"mixture: datasets {self.names[chosen[0]]!r} and {self.names[i]!r} share the robot "
                        f"{self._robots[robot]!r} but not its {key}: {expected} and {found}; rename them in "
                        "fields, or give each a robot (embodiment) of its own"
                    )
        return replace(first, cameras=tuple(sized[name] for name in sized if name in names))

    def _split(self, rows: np.ndarray) -> list[tuple[Source, np.ndarray, np.ndarray]]:
        """Each dataset among `rows`: itself, the places of its rows, and their numbers in it."""
        datasets = self.dataset(rows)
        return [
            (self.parts[i], places := np.flatnonzero(datasets == i), rows[places] - self.starts[i])
            for i in np.unique(datasets)
        ]

    def _padded(
        self, rows: np.ndarray, width: int, read: Callable[[Source, np.ndarray], np.ndarray]
    ) -> Float[np.ndarray, "n dim"]:
        out = np.zeros((len(rows), width), np.float32)
        for part, places, own in self._split(rows):
            values = read(part, own)
            out[places, : values.shape[1]] = values
        return out


def _open(dataset: Mapping[str, Any], common: Mapping[str, Any]) -> Source:
    def own(key: str, default: Any, whole: Any) -> Any:
        value = dataset.get(key)
        return whole if value is None or value == default else value

    options: dict[str, Any] = {"cameras": dataset.get("cameras")}
    options["image_size"] = own("image_size", None, common["image_size"])
    whole = common["cache"] if isinstance(common["cache"], CacheOptions) else CacheOptions(common["cache"])
    cache = CacheOptions(
        own("cache", "none", whole.mode),
        own("cache_build", "ahead", whole.build),
        own("cache_limit_gb", None, whole.limit_gb),
    )
    options["cache"] = cache.mode if cache == CacheOptions(cache.mode) else cache
    if own("on_error", "raise", common["on_error"]) == "skip":
        options["on_error"] = "skip"
    factory: SourceFactory = dataset["source"]
    return strided(factory(**options), dataset.get("stride", 1), dataset.get("stride_rotation"))


def _cameras(
    specs: Sequence[RobotSpec], chosen: Sequence[str] | None, image_size: Sequence[int] | None
) -> dict[str, Camera]:
    """Every camera by name, at one size each."""
    sized: dict[str, Camera] = {}
    for spec in specs:
        for camera in spec.cameras:
            largest = max(sized.get(camera.name, camera), camera, key=lambda c: c.height * c.width)
            sized[camera.name] = largest
    for name in chosen or ():
        if name not in sized:
            raise LibrobotError(f"mixture: no camera {name!r}; {nearest(name, sized)}")
    return {
        name: camera if image_size is None else Camera(name, int(image_size[0]), int(image_size[1]))
        for name, camera in sized.items()
        if chosen is None or name in chosen
    }


def _widest(key: str, each: Sequence[tuple[Dim, ...]], width: int | None) -> tuple[Dim, ...]:
    dims = max(each, key=len)
    if width is not None and width < len(dims):
        raise ValueError(f"{key}_dim: the widest robot has {len(dims)} dimensions, found {width}")
    return dims + tuple(Dim(f"padding_{i}") for i in range(len(dims), width or 0))


def _sized(frames: UInt8[np.ndarray, "n c h w"], size: tuple[int, ...]) -> UInt8[np.ndarray, "n c h w"]:
    if frames.shape[2:] == size:
        return frames
    resized = [resize_with_padding(frame.transpose(1, 2, 0), *size) for frame in frames]
    return np.stack(resized).transpose(0, 3, 1, 2)
