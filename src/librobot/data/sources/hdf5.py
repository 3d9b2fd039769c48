"""HDF5: robomimic, LIBERO, ALOHA and ACT, or any layout that a YAML describes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from librobot.data.remote import local_root
from librobot.data.sources.base import Cache, OnError
from librobot.data.sources.hdf5_files import Hdf5Column, attribute, groups, natural, open_hdf5, stored_spec
from librobot.data.sources.hdf5_layouts import Layout, read_layout
from librobot.data.sources.stored import Episodes, StoredSource, join_prompts, read_each
from librobot.errors import LibrobotError
from librobot.types import Camera, Dim, RobotSpec


@dataclass(frozen=True)
class Hdf5Episode:
    """One episode as found: where it lies, its vectors (T, dims) float32, its instruction, and its pictures:
    camera name -> (path of the dataset, (height, width))."""

    path: Path
    group: str
    state: np.ndarray
    action: np.ndarray
    prompt: str
    cameras: dict[str, tuple[str, tuple[int, int]]]

    @property
    def place(self) -> str:
        return f"{self.path}: {self.group}" if self.group else str(self.path)


class Hdf5Source(StoredSource):
    """A folder of HDF5 files, or one file: states and actions in memory, pictures read when asked for.

    layout: robomimic, libero, aloha, or the fields of a `Layout`. prompt: the instruction of every episode;
    None: as the layout finds it, else the file's name. filter_key: only the episodes that the file's
    mask/<filter_key> lists (robomimic). rotate: turn pictures by 180 degrees (LIBERO's stand on their head).
    robot, control_hz: over the layout's. on_error: "skip" leaves out episodes that cannot be read.

    Raises LibrobotError, by file and episode, for missing datasets, vectors of unequal length and shapes
    that differ between episodes.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        layout: str | Mapping[str, Any] = "robomimic",
        cameras: Sequence[str] | None = None,
        image_size: Sequence[int] | None = None,
        cache: Cache = "none",
        cache_dir: str | Path | None = None,
        prompt: str | None = None,
        filter_key: str | None = None,
        rotate: bool = False,
        robot: str | None = None,
        control_hz: float | None = None,
        on_error: OnError = "raise",
    ) -> None:
        self.layout = read_layout(layout)
        root = local_root(root)
        places = [place for path in _files(root, self.layout) for place in self._groups(path, filter_key)]
        if not places:
            raise LibrobotError(
                f"{root}: no episode {self.layout.episode!r} in its files; set data.source.layout"
            )
        found = read_each(places, lambda place: self._read(*place, prompt), on_error)
        first = found[0]
        found = read_each(found, lambda episode: _alike(first, episode), on_error)
        lengths = np.array([len(episode.action) for episode in found])
        prompts, prompt_of_row = join_prompts([episode.prompt for episode in found], lengths)
        spec = stored_spec(first.path) or RobotSpec(
            name=self.layout.robot,
            cameras=(),
            state=_dims(self.layout.state_dims, self.layout.state, first.state.shape[1]),
            action=_dims(self.layout.action_dims, self.layout.action, first.action.shape[1]),
            control_hz=self.layout.control_hz,
        )
        spec = RobotSpec(
            name=robot or spec.name,
            cameras=tuple(Camera(name, *size) for name, (_, size) in first.cameras.items()),
            state=spec.state,
            action=spec.action,
            control_hz=control_hz or spec.control_hz,
        )
        files = [episode.path for episode in found]
        columns = {
            name: Hdf5Column(files, [episode.cameras[name][0] for episode in found], lengths, rotate)
            for name in first.cameras
        }
        super().__init__(
            Episodes(
                root=root,
                spec=spec,
                lengths=lengths,
                states=np.concatenate([episode.state for episode in found]),
                actions=np.concatenate([episode.action for episode in found]),
                prompts=prompts,
                prompt_of_row=prompt_of_row,
                columns=columns,
                files=sorted(set(files)),
                places=[episode.place for episode in found],
                provenance={"format": "hdf5"},
                names=(" + ".join(self.layout.state), " + ".join(self.layout.action)),
            ),
            cameras=cameras,
            image_size=image_size,
            cache=cache,
            cache_dir=cache_dir,
            described=[{name: column.datasets for name, column in columns.items()}, rotate],
            on_error=on_error,
        )

    def _groups(self, path: Path, filter_key: str | None) -> Iterator[tuple[Path, str]]:
        with open_hdf5(path) as file:
            names = groups(file, self.layout.episode)
            if filter_key is not None:
                if f"mask/{filter_key}" not in file:
                    raise LibrobotError(f"{path}: no mask/{filter_key}; found {sorted(file.get('mask', {}))}")
                kept = {name.decode() for name in file[f"mask/{filter_key}"][()]}
                names = [name for name in names if name.rpartition("/")[2] in kept]
        yield from ((path, name) for name in names)

    def _read(self, path: Path, group: str, prompt: str | None) -> Hdf5Episode:
        with open_hdf5(path) as file:
            episode = file[group] if group else file
            place = f"{path}: {group}" if group else str(path)
            action = _vector(episode, self.layout.action, place)
            state = _vector(episode, self.layout.state, place)
            if not self.layout.state:
                state = np.zeros((len(action), 0), np.float32)
            if len(state) != len(action):
                raise LibrobotError(
                    f"{place}: {' + '.join(self.layout.state)} has {len(state)} steps, "
                    f"{' + '.join(self.layout.action)} {len(action)}; an episode has one of each per step"
                )
            if not len(action):
                raise LibrobotError(f"{place}: the episode has no step; remove it")
            found = prompt
            for where in self.layout.prompt:
                found = attribute(file, group, where, place) if found is None else found
            cameras = _cameras(episode, self.layout.cameras, len(action), place)
        words = path.stem if self.layout.episode else path.parent.name
        named = words.removesuffix("_demo").replace("_", " ")
        return Hdf5Episode(path, group, state, action, named if found is None else found, cameras)


def _files(root: Path, layout: Layout) -> list[Path]:
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise LibrobotError(f"{root}: no such file or folder; expected HDF5 files")
    found = sorted(root.glob(layout.files), key=natural)
    if not found:
        names = sorted(path.name for path in root.iterdir())[:8]
        raise LibrobotError(
            f"{root}: no file {layout.files!r} in it; found {', '.join(names) or 'an empty folder'}. Name "
            "another data.source.layout, or its files"
        )
    return found


def _vector(episode: Any, names: Sequence[str], place: str) -> np.ndarray:
    """The datasets `names` side by side, (T, dims) float32."""
    parts = []
    for name in names:
        values = np.asarray(_dataset(episode, name, place)[()])
        if values.ndim not in (1, 2) or values.dtype.kind not in "fiub":
            raise LibrobotError(
                f"{place}: {name}: expected numbers of shape (T,) or (T, dims), found {values.dtype} "
                f"{values.shape}"
            )
        parts.append(values.reshape(len(values), math.prod(values.shape[1:])).astype(np.float32))
    if len({len(part) for part in parts}) > 1:
        steps = ", ".join(f"{name} {len(part)}" for name, part in zip(names, parts, strict=True))
        raise LibrobotError(f"{place}: its datasets differ in length ({steps} steps)")
    return np.concatenate(parts, axis=1) if parts else np.zeros((0, 0), np.float32)


def _cameras(
    episode: Any, wanted: Mapping[str, str], length: int, place: str
) -> dict[str, tuple[str, tuple[int, int]]]:
    paths = {name: path for name, path in wanted.items() if name != "*"}
    if "*" in wanted:
        paths |= {name: f"{wanted['*']}/{name}" for name in episode.get(wanted["*"], {})}
    cameras = {}
    for name, path in paths.items():
        if path not in episode:
            continue  # a layout names the usual cameras; `_alike` sees one that only some episodes have
        dataset = _dataset(episode, path, place)
        if len(dataset) != length:
            raise LibrobotError(f"{place}: {path} has {len(dataset)} pictures, expected {length}")
        cameras[name] = (dataset.name, Hdf5Column.size(dataset, place))
    return cameras


def _dataset(episode: Any, name: str, place: str) -> Any:
    found = episode.get(name)
    if found is None or not hasattr(found, "shape"):
        near: list[str] = []
        episode.visititems(lambda key, item: near.append(key) if hasattr(item, "shape") else None)
        raise LibrobotError(
            f"{place}: no dataset {name!r}; found {', '.join(near[:12]) or 'none'}. Describe the file with "
            "data.source.layout"
        )
    return found


def _alike(first: Hdf5Episode, episode: Hdf5Episode) -> Hdf5Episode:
    for what, expected, found in (
        ("state", first.state.shape[1], episode.state.shape[1]),
        ("action", first.action.shape[1], episode.action.shape[1]),
        ("cameras", sorted(first.cameras), sorted(episode.cameras)),
    ):
        if expected != found:
            raise LibrobotError(
                f"{episode.place}: {what}: expected {expected} as in {first.place}, found {found}"
            )
    return episode


def _dims(described: Sequence[Dim], names: Sequence[str], size: int) -> tuple[Dim, ...]:
    if len(described) == size:
        return tuple(described)
    stem = names[0].rpartition("/")[2] if len(names) == 1 else "value"
    return tuple(Dim(f"{stem}_{i}") for i in range(size))
