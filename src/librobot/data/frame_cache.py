"""Frames decoded once: each camera's rows in pieces, files of raw pixels or of small quick video."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8

from librobot.data.files import written_whole
from librobot.data.metadata import Metadata

PIECE_FRAMES = 256
"""Rows of a file: what a builder holds in memory at a time, and loses when it is killed."""


class FrameCache:
    """Some or all of one camera's frames, uint8 (n, c, h, w), in `folder/<camera>/<piece>`.

    A piece gets its name when it is whole, so that whatever is there can be read, by any number of processes,
    while others are still made.
    """

    suffix = ".npy"

    def __init__(self, folder: Path, camera: str, shape: tuple[int, int, int, int]) -> None:
        self.folder, self.camera, self.shape = folder / camera, camera, shape
        self.piece_frames = PIECE_FRAMES
        self.pieces = -(-shape[0] // PIECE_FRAMES)
        self._open: dict[int, np.ndarray] = {}
        self._seen = np.zeros(self.pieces, bool)

    def path(self, piece: int) -> Path:
        return self.folder / f"{piece:05d}{self.suffix}"

    def rows(self, piece: int) -> Int[np.ndarray, " n"]:
        return np.arange(piece * self.piece_frames, min((piece + 1) * self.piece_frames, self.shape[0]))

    def missing(self) -> list[int]:
        """The pieces that are not there yet."""
        there = {path.name for path in self.folder.glob(f"*{self.suffix}")}
        return [piece for piece in range(self.pieces) if self.path(piece).name not in there]

    def available(self, rows: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which of the rows can be read from here by now."""
        pieces = rows // self.piece_frames
        for piece in np.unique(pieces[~self._seen[pieces]]):
            self._seen[piece] = self.path(int(piece)).exists()
        return self._seen[pieces]

    def read_into(
        self,
        rows: Int[np.ndarray, " n"],
        out: UInt8[np.ndarray, "m c h w"],
        places: Int[np.ndarray, " n"],
    ) -> None:
        """Put the frames of available, ascending `rows` into out[places]."""
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            piece, frame = divmod(row, self.piece_frames)
            if piece not in self._open:
                self._open[piece] = np.load(self.path(piece), mmap_mode="r")
            out[place] = self._open[piece][frame]

    def write(self, piece: int, frames: UInt8[np.ndarray, "n c h w"]) -> None:
        with written_whole(self.path(piece)) as temporary, temporary.open("wb") as file:
            np.save(file, frames)

    def estimated_bytes(self, pieces: int) -> int:
        """About so many does it take to store so many pieces."""
        return pieces * self.piece_frames * int(np.prod(self.shape[1:]))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}  # a pickled memory map would carry every pixel


def dataset_files(metadata: Metadata) -> list[Path]:
    """What the pixels of a LeRobotDataset depend on."""
    videos = [key for key, feature in metadata.features.items() if feature["dtype"] == "video"]
    files = [path for path, _ in metadata.data_files()]
    files += [path for key in videos for path, _ in metadata.video_files(key)]
    return files + sorted((metadata.root / "meta/episodes").glob("*/*.parquet"))


def file_fingerprint(files: Iterable[Path], described: Any) -> str:
    """A name for what was made of exactly these files (by path, size and time) in the way `described`."""
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for path in files:
        stat = os.stat(path) if path.exists() else None
        digest.update(repr((str(path), stat and stat.st_size, stat and stat.st_mtime_ns)).encode())
    return digest.hexdigest()[:20]
