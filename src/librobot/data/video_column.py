"""One camera stored as video: several episodes to a file, frames found by time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from av import FFmpegError, VideoFrame
from jaxtyping import Int, UInt8

from librobot.data.local_cache import LocalCache
from librobot.data.metadata import Metadata
from librobot.data.tables import read_columns
from librobot.data.video import count_frames, count_whole_frames, missing_bytes
from librobot.data.video_reader import TOLERANCE, FrameNotFound, VideoReader, interleaved
from librobot.errors import LibrobotError

OPEN_DECODERS = 32
"""Per camera and thread; one takes a megabyte or two at 480 x 640."""


class VideoColumn:
    """The frames of the video feature `key`. `problems` says, by episode, which files are missing or cut
    short; they are not looked at where `fetch` brings each file (its local path to itself) when it is first
    read.
    """

    def __init__(self, metadata: Metadata, key: str, fetch: Callable[[Path], Path] | None = None) -> None:
        self.key, self.fps, self.fetch = key, metadata.fps, fetch
        self.lengths = metadata.lengths
        files = metadata.video_files(key)
        self.paths = [path for path, _ in files]
        self.file_of_episode = np.zeros(len(self.lengths), np.int64)
        for i, (_, episodes) in enumerate(files):
            self.file_of_episode[episodes] = i
        timestamps = read_columns(metadata, ["timestamp"])["timestamp"].reshape(-1)
        self.begins = metadata.column(f"videos/{key}/from_timestamp").astype(np.float64)
        self.times = np.repeat(self.begins, self.lengths) + timestamps
        # A float32 timestamp alone is farther off than the tolerance after about half an hour of one episode.
        self.tolerance = TOLERANCE + float(np.spacing(np.float32(timestamps.max(initial=0))))
        self.ends = np.cumsum(self.lengths)
        self.problems: dict[int, str] = {}
        for file in range(len(files) if fetch is None else 0):
            self._check_file(file)
        self._open = LocalCache(self._open_file, capacity=OPEN_DECODERS)

    def read(self, rows: Int[np.ndarray, " n"]) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The frames of ascending `rows`."""
        return map(interleaved, self.frames(rows))

    def frames(self, rows: Int[np.ndarray, " n"]) -> Iterator[VideoFrame]:
        """The same as the decoder gives them, one at a time: neighbours share the decoding of their
        keyframe."""
        for row, file in zip(rows.tolist(), self.files_of(rows).tolist(), strict=True):
            try:
                yield self._open(file).frame(float(self.times[row]), self.tolerance)
            except FrameNotFound as error:
                raise self._broken(file, row, str(error), error.end) from error

    def files_of(self, rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """In which of `paths` their frames are."""
        return self.file_of_episode[np.searchsorted(self.ends, rows, side="right")]

    def _open_file(self, file: int) -> VideoReader:
        path = self.paths[file]
        while True:
            try:
                return VideoReader(path if self.fetch is None else self.fetch(path))
            except FFmpegError as error:
                if self.fetch is not None and not path.exists():
                    continue  # another process made room for its own just now
                raise LibrobotError(
                    f"{path}: cannot be opened as a video ({error}); copy it again"
                ) from error

    def _check_file(self, file: int) -> None:
        """Cheap checks: the file is there, whole by its own index, and has enough frames for its episodes."""
        path = self.paths[file]
        episodes = np.flatnonzero(self.file_of_episode == file)
        needed = np.round(self.begins[episodes] * self.fps).astype(int) + self.lengths[episodes]
        if not path.exists():
            missing = (
                f"{path}: missing; expected the video of episodes {episodes[0]} to {episodes[-1]} "
                f"({needed.max()} frames). Download or copy the dataset again"
            )
            self.problems |= dict.fromkeys(episodes.tolist(), missing)
            return
        try:
            short = missing_bytes(path)
            announced = count_frames(path)
        except FFmpegError:
            short, announced = 1, 0
        if short or 0 < announced < needed.max():
            found = count_whole_frames(path) if short else announced
            episode = int(episodes[np.argmax(needed > found)])
            message = str(self._cut_short(file, episode, int(needed.max()), found))
            self.problems |= dict.fromkeys(episodes[episodes >= episode].tolist(), message)

    def _broken(self, file: int, row: int, message: str, end: bool) -> LibrobotError:
        episode = int(np.searchsorted(self.ends, row, side="right"))
        if end:
            episodes = np.flatnonzero(self.file_of_episode == file)
            needed = np.round(self.begins[episodes] * self.fps).astype(int) + self.lengths[episodes]
            found = min(round(float(self.times[row]) * self.fps), count_whole_frames(self.paths[file]))
            return self._cut_short(file, episode, int(needed.max()), found)
        frame = row - int(self.ends[episode] - self.lengths[episode])
        return LibrobotError(
            f"{self.paths[file]}: episode {episode}, frame {frame}: {message} (tolerance {self.tolerance:g} "
            "s). The video's frame times are not those of the table"
        )

    def _cut_short(self, file: int, episode: int, expected: int, found: int) -> LibrobotError:
        return LibrobotError(
            f"{self.paths[file]}: the video is cut short or damaged from episode {episode} on: expected "
            f"{expected} frames, found {found}. Copy the file again, or remove the episodes from {episode} on"
        )
