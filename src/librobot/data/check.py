"""What is wrong with a dataset, found without training on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from librobot.data.grippers import gripper_problems
from librobot.data.metadata import Metadata
from librobot.data.sources.base import Source
from librobot.data.tables import read_columns
from librobot.data.video import count_frames
from librobot.data.video_reader import TOLERANCE
from librobot.errors import LibrobotError
from librobot.progress import ProgressBar

JUMP_FACTOR = 10.0
"""A change between two steps is a jump above so many times the 95th percentile of a dimension's changes."""
JUMP_SHARE = 0.5
"""... and above this share of the dimension's whole range."""
STRETCH = 8
"""Frames in a row, in the middle of an episode, that are looked at for repeated pictures."""
MOVED = 0.01
"""A step moves the robot where a state changes by this share of its range."""
BLACK = 8
"""A picture whose brightest pixel is below this is black."""


@dataclass(frozen=True)
class Finding:
    """One problem. kind: a word to search for; where: episode, dimension or file; episodes: those that have
    it, none where it is the whole dataset's."""

    kind: str
    where: str
    what: str
    episodes: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.what}"


def check(source: Source, *, pictures: int = 3, show: bool = True) -> list[Finding]:
    """Everything found: constant dimensions, jumps, grippers (see `gripper_problems`), episodes of one frame,
    empty instructions, black cameras, frozen ones, pictures that cannot be read (`pictures` of each episode
    are looked at), pictures that come twice while the robot moves (dropped frames), and, of a LeRobotDataset,
    timestamps that are not frame_index / fps and videos longer than their episodes.

    Values that are not finite, missing and truncated files raise LibrobotError when the source is opened.
    """
    findings = [*_vectors(source), *_grippers(source), *_episodes(source)]
    metadata = getattr(source, "metadata", None)
    if isinstance(metadata, Metadata):
        findings += [*_timestamps(metadata), *_videos(metadata)]
    return findings + list(_pictures(source, pictures, show))


def _vectors(source: Source) -> Iterator[Finding]:
    lengths = source.episode_lengths
    rows = np.arange(int(lengths.sum()))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    inside = owner[1:] == owner[:-1]
    begins = np.cumsum(lengths) - lengths
    for key, values, dims in (
        ("state", source.states(rows), source.spec.state),
        ("action", source.actions(rows), source.spec.action),
    ):
        for i, dim in enumerate(dims):
            x = values[:, i].astype(np.float64)
            spread = float(np.ptp(x))
            if spread == 0:
                yield Finding("constant", f"{key} {dim.name!r}", f"is {x[0]:g} in every frame")
                continue
            change = np.abs(np.diff(x))
            change[~inside] = 0
            usual = float(np.quantile(change[inside], 0.95)) if inside.any() else 0.0
            jumps = np.flatnonzero((change > JUMP_FACTOR * usual) & (change > JUMP_SHARE * spread))
            if dim.kind != "gripper" and usual > 0 and len(jumps):
                row = int(jumps[0]) + 1
                episode = int(owner[row])
                yield Finding(
                    "jump",
                    f"{key} {dim.name!r}, episode {episode}, frame {row - int(begins[episode])}",
                    f"goes from {x[row - 1]:g} to {x[row]:g}; 95 % of the changes are below {usual:g} "
                    f"({len(jumps)} such jumps)",
                    tuple(np.unique(owner[jumps + 1]).tolist()),
                )


def _grippers(source: Source) -> Iterator[Finding]:
    lengths = source.episode_lengths
    rows = np.arange(int(lengths.sum()))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    dims = (source.spec.state, source.spec.action)
    for where, what, episodes in gripper_problems(source.states(rows), source.actions(rows), dims, owner):
        yield Finding("gripper", where, what, episodes)


def _episodes(source: Source) -> Iterator[Finding]:
    lengths = source.episode_lengths
    for episode in np.flatnonzero(lengths < 2):
        yield Finding("short", f"episode {episode}", "has one frame", (int(episode),))
    first = np.cumsum(lengths) - lengths
    empty = [i for i, prompt in enumerate(source.prompts(first)) if not prompt.strip()]
    if empty:
        where, what = f"episode {empty[0]}", f"is empty, as in {len(empty)} episodes"
        yield Finding("instruction", where, what, tuple(empty))


def _timestamps(metadata: Metadata) -> Iterator[Finding]:
    times = read_columns(metadata, ["timestamp"])["timestamp"].reshape(-1)
    begins = np.cumsum(metadata.lengths) - metadata.lengths
    for episode, (begin, length) in enumerate(zip(begins, metadata.lengths, strict=True)):
        own = times[begin : begin + length].astype(np.float64)
        tolerance = TOLERANCE + float(np.spacing(np.float32(own.max(initial=0))))
        off = np.abs(own - np.arange(length) / metadata.fps) > tolerance
        if (np.diff(own) <= 0).any():
            frame = int(np.argmax(np.diff(own) <= 0)) + 1
            what = f"{own[frame]:g} s is not after the last"
            yield Finding("timestamps", f"episode {episode}, frame {frame}", what, (episode,))
        elif off.any():
            frame = int(np.argmax(off))
            yield Finding(
                "timestamps",
                f"episode {episode}, frame {frame}",
                f"expected {frame / metadata.fps:g} s at {metadata.fps:g} Hz, found {own[frame]:g} s",
                (episode,),
            )


def _videos(metadata: Metadata) -> Iterator[Finding]:
    for key in (key for key, feature in metadata.features.items() if feature["dtype"] == "video"):
        begins = metadata.column(f"videos/{key}/from_timestamp")
        for path, episodes in metadata.video_files(key):
            needed = int((np.round(begins[episodes] * metadata.fps) + metadata.lengths[episodes]).max())
            found = count_frames(path)
            if found > needed:
                yield Finding(
                    "video",
                    str(path),
                    f"has {found} frames, its episodes {episodes[0]} to {episodes[-1]} {needed}",
                )


def _pictures(source: Source, count: int, show: bool) -> Iterator[Finding]:
    if not source.spec.cameras or count < 1:
        return
    lengths = source.episode_lengths
    states = source.states(np.arange(int(lengths.sum())))
    spread = np.ptp(states, axis=0) if states.size else np.zeros(states.shape[1])
    with ProgressBar("looking at pictures", len(lengths), show=show) as progress:
        for episode, (begin, length) in enumerate(zip(np.cumsum(lengths) - lengths, lengths, strict=True)):
            rows = begin + np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))
            progress.advance(1)
            stretch = begin + np.arange(max(0, (length - STRETCH) // 2), min(length, (length + STRETCH) // 2))
            try:
                images, near = source.images(rows), source.images(stretch)
            except LibrobotError as error:
                yield Finding("picture", f"episode {episode}", str(error), (episode,))
                continue
            moved = np.ptp(source.states(rows), axis=0).any() if source.spec.state_dim else False
            for name, frames in images.items():
                where = f"camera {name}, episode {episode}"
                if frames.max() < BLACK:
                    yield Finding("black", where, "every picture looked at is black", (episode,))
                elif moved and len(rows) > 2 and (frames == frames[:1]).all():
                    yield Finding("frozen", where, "does not change, the state does", (episode,))
                elif len(twice := _repeated(near[name], states[stretch], spread)):
                    yield Finding(
                        "repeated",
                        f"{where}, frame {int(stretch[twice[0] + 1] - begin)}",
                        f"the picture of the frame before again, while the robot moves ({len(twice)} of "
                        f"{len(stretch) - 1} frames looked at): dropped frames",
                        (episode,),
                    )


def _repeated(frames: np.ndarray, states: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """The steps in which the robot moves and the picture stays exactly as it is."""
    same = (frames[1:] == frames[:-1]).all(axis=(1, 2, 3))
    moves = (np.abs(np.diff(states, axis=0)) > MOVED * np.where(spread > 0, spread, np.inf)).any(axis=1)
    return np.flatnonzero(same & moves)
