"""What the sources of all formats share once their files are understood: vectors in memory, images by row."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from librobot.data.cached_frames import cache_name, open_caches
from librobot.data.camera_frames import CameraFrames, Column, chosen
from librobot.data.frame_cache import file_fingerprint
from librobot.data.sources.base import Cache, CacheOptions, OnError
from librobot.data.statistics import kept_statistics
from librobot.errors import LibrobotError, nearest
from librobot.types import RobotSpec


@dataclass
class Episodes:
    """The content of a dataset, in the order of its rows.

    states (n, s) and actions (n, a) are float32; prompt_of_row (n,) indexes `prompts`; columns: one for each
    camera of `spec`, which gives the stored sizes. files: what the pixels depend on, by whose sizes and times
    a frame cache knows that it is still theirs. For errors: `places` says where each episode lies,
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
    places: Sequence[str]
    provenance: Mapping[str, Any]
    names: tuple[str, str] = ("state", "action")


class StoredSource:
    """A `Source` over `Episodes`. cameras, image_size, cache: see `SourceFactory`; cache_dir: where decoded
    frames are kept (default $LIBROBOT_CACHE/frames or ~/.cache/librobot/frames). described: plain values
    that the pixels depend on beside the files.

    on_error: whether episodes with values that are not finite raise LibrobotError, by file, episode and
    frame, or are left out.
    """

    def __init__(
        self,
        episodes: Episodes,
        *,
        cameras: Sequence[str] | None = None,
        image_size: Sequence[int] | None = None,
        cache: Cache = "none",
        cache_dir: str | Path | None = None,
        described: Any = None,
        on_error: OnError = "raise",
    ) -> None:
        check_options(image_size, cache)
        episodes, left_out = finite_episodes(episodes, on_error)
        spec = episodes.spec
        for name in cameras or ():
            if name not in spec.camera_names:
                raise LibrobotError(
                    f"{episodes.root}: no camera {name!r} in the dataset; {nearest(name, spec.camera_names)}"
                )
        if cameras is not None:
            spec = spec.with_cameras(cameras)
        stored_spec = spec
        self.image_size = (int(image_size[0]), int(image_size[1])) if image_size is not None else None
        if self.image_size is not None:
            height, width = self.image_size
            sized = tuple(replace(camera, height=height, width=width) for camera in spec.cameras)
            spec = replace(spec, cameras=sized)
        self.root, self.spec = episodes.root, spec
        self.episode_lengths = episodes.lengths.astype(np.int64)
        self._states, self._actions = episodes.states, episodes.actions
        self._prompts, self._prompt_of_row = list(episodes.prompts), episodes.prompt_of_row
        self._places = list(episodes.places)
        self._frames = CameraFrames(
            episodes.columns, spec.cameras, self.image_size, self._at, int(self.episode_lengths.sum())
        )
        self.provenance: dict[str, Any] = {
            "renderer": None,
            "env": None,
            **episodes.provenance,
            "root": str(self.root),
            "episodes": len(self.episode_lengths),
            "frames": int(self.episode_lengths.sum()),
        }
        self._files = list(episodes.files)
        self._described = [str(self.root), self.image_size, described, *([left_out] if left_out else [])]
        self._cache_in_use: Any = None
        options = cache if isinstance(cache, CacheOptions) else CacheOptions(cache)
        if options.mode != "none" and spec.cameras:
            folder = Path(cache_dir or default_cache_dir() / "frames").expanduser()
            name, mode = file_fingerprint(self._files, self._described), cache_name(options.mode)
            self._cache_in_use = open_caches(
                folder / f"{name}-{mode}", options, self._frames, stored_spec, self._unchanged(name)
            )

    def states(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n s"]:
        return self._states[rows]

    def actions(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n a"]:
        return self._actions[rows]

    def prompts(self, rows: Int[np.ndarray, " n"]) -> list[str]:
        return [self._prompts[i] for i in self._prompt_of_row[rows]]

    def images(self, rows: Int[np.ndarray, " n"]) -> dict[str, UInt8[np.ndarray, "n c h w"]]:
        return self._frames.read(rows)

    def statistics(self) -> dict[str, dict[str, Float[np.ndarray, " dim"]]]:
        """Of the vectors in memory: no picture is read. Those of large datasets are kept in
        $LIBROBOT_CACHE/statistics."""
        folder = default_cache_dir() / "statistics"
        return {
            "state": kept_statistics(self._states, folder),
            "action": kept_statistics(self._actions, folder),
        }

    def _at(self, row: int) -> str:
        return place_of(row, self.episode_lengths, self._places)

    def _unchanged(self, name: str) -> Callable[[], bool]:
        return partial(_is_fingerprint, name, self._files, self._described)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache_in_use": None}  # a process that got a copy holds no lock


def _is_fingerprint(name: str, files: Sequence[Path], described: Any) -> bool:
    return file_fingerprint(files, described) == name


def place_of(row: int, lengths: Int[np.ndarray, " e"], places: Sequence[str]) -> str:
    """Which frame `row` is, for an error."""
    ends = np.cumsum(lengths)
    episode = int(np.searchsorted(ends, row, side="right"))
    return f"{places[episode]}: episode {episode}, frame {row - int(ends[episode] - lengths[episode])}"


def finite_episodes(episodes: Episodes, on_error: OnError) -> tuple[Episodes, list[int]]:
    """The episodes all of whose values are finite, and the numbers of the others.

    Raises LibrobotError where there are others, unless on_error is "skip".
    """
    owner = np.repeat(np.arange(len(episodes.lengths)), episodes.lengths)
    problems: dict[int, str] = {}
    for name, values, dims in (
        (episodes.names[0], episodes.states, episodes.spec.state),
        (episodes.names[1], episodes.actions, episodes.spec.action),
    ):
        if np.isfinite(values).all():
            continue
        bad = np.argwhere(~np.isfinite(values))
        for row, dim in bad[np.unique(owner[bad[:, 0]], return_index=True)[1]]:
            problems.setdefault(
                int(owner[row]),
                f"{place_of(int(row), episodes.lengths, episodes.places)}: {name} dimension "
                f"{dims[dim].name!r} is {values[row, dim]}; every value must be finite ({len(bad)} are not). "
                "Remove the episode or record it again",
            )
    return without(episodes, problems, on_error), sorted(problems)


def without(episodes: Episodes, problems: Mapping[int, str], on_error: OnError) -> Episodes:
    """`episodes` less those that have a problem; see `read_each`."""

    def check(episode: int) -> int:
        if episode in problems:
            raise LibrobotError(problems[episode])
        return episode

    if not problems:
        return episodes
    kept = np.array(read_each(range(len(episodes.lengths)), check, on_error))
    rows = np.flatnonzero(np.isin(np.repeat(np.arange(len(episodes.lengths)), episodes.lengths), kept))
    return replace(
        episodes,
        lengths=episodes.lengths[kept],
        states=episodes.states[rows],
        actions=episodes.actions[rows],
        prompt_of_row=episodes.prompt_of_row[rows],
        columns={name: chosen(column, rows) for name, column in episodes.columns.items()},
        places=[episodes.places[episode] for episode in kept],
    )


def check_options(image_size: Sequence[int] | None, cache: Cache) -> None:
    """Raise ValueError for what no source takes."""
    if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
        raise ValueError(f"image_size must be [height, width] in pixels or null, found {image_size}")
    if not isinstance(cache, CacheOptions):
        CacheOptions(cache)


def read_each[Item, Result](
    items: Iterable[Item], read: Callable[[Item], Result], on_error: OnError
) -> list[Result]:
    """`read` of every item. With on_error="skip" those that raise LibrobotError are left out, counted and
    reported; that none is left is an error always."""
    results, problems = [], []
    for item in items:
        try:
            results.append(read(item))
        except LibrobotError as error:
            if on_error == "raise":
                raise
            problems.append(str(error))
    if problems and not results:
        raise LibrobotError(f"none of the {len(problems)} episodes can be read; the first: {problems[0]}")
    if problems:
        warnings.warn(
            f"{len(problems)} of {len(problems) + len(results)} episodes are left out (on_error=skip): "
            + "; ".join(problems[:5]),
            stacklevel=3,
        )
    return results


def join_prompts(
    each: Sequence[str], lengths: Int[np.ndarray, " e"]
) -> tuple[list[str], Int[np.ndarray, " n"]]:
    """The different instructions of episodes that have one each, and which of them each row has."""
    prompts = list(dict.fromkeys(each))
    number = {prompt: i for i, prompt in enumerate(prompts)}
    return prompts, np.repeat(np.array([number[prompt] for prompt in each], np.int64), lengths)


def default_cache_dir() -> Path:
    """$LIBROBOT_CACHE, else ~/.cache/librobot."""
    return Path(os.environ.get("LIBROBOT_CACHE") or "~/.cache/librobot").expanduser()
