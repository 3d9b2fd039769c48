"""Decoded frames in memory-mapped files: each frame is decoded once, a batch is then one gather."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from librobot.data import shared_memory
from librobot.data.files import locked, remove_temporaries, written_whole
from librobot.data.metadata import Metadata
from librobot.errors import LibrobotError
from librobot.progress import ProgressBar

BLOCK_FRAMES = 256
"""Frames decoded at a time by one worker: what bounds the memory."""

Decode = Callable[[str, np.ndarray], np.ndarray]


class FrameCache:
    """One camera's frames, uint8 (n, c, h, w) in `folder/<camera>.npy`, mapped into memory when first
    read."""

    def __init__(self, folder: Path, camera: str, shape: tuple[int, int, int, int]) -> None:
        self.camera, self.shape = camera, shape
        self.path = folder / f"{camera}.npy"
        self._frames: np.memmap | None = None

    def read(self, rows: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n c h w"]:
        if self._frames is None:
            self._frames = np.load(self.path, mmap_mode="r")
        out = shared_memory.empty((len(rows), *self.shape[1:]))
        return np.take(self._frames, rows, axis=0, out=out, mode="clip")

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_frames": None}  # a pickled memory map would carry every pixel

    @property
    def complete(self) -> bool:
        if not self.path.exists():
            return False
        return np.load(self.path, mmap_mode="r").shape == self.shape

    @staticmethod
    def build(caches: Sequence[FrameCache], decode: Decode, *, num_workers: int = 2) -> None:
        """Write the files that are missing. `decode(camera, rows)` must be safe in threads.

        A file gets its name when it is whole; processes that start at once wait for the first to finish.
        """
        if not caches or all(cache.complete for cache in caches):
            return
        folder = caches[0].path.parent
        with locked(folder.with_suffix(".lock")):
            missing = [cache for cache in caches if not cache.complete]
            if not missing:
                return
            folder.mkdir(parents=True, exist_ok=True)
            remove_temporaries(folder)
            _check_space(folder, missing)
            total = sum(cache.shape[0] for cache in missing)
            with ProgressBar("decoding frames", total) as progress, ThreadPoolExecutor(num_workers) as pool:
                for cache in missing:
                    cache._write(decode, pool, num_workers, progress.advance)

    def _write(
        self, decode: Decode, pool: ThreadPoolExecutor, num_workers: int, advance: Callable[[int], None]
    ) -> None:
        with written_whole(self.path) as temporary:
            frames = np.lib.format.open_memmap(temporary, "w+", np.uint8, self.shape)

            def work(rows: np.ndarray) -> int:
                frames[rows[0] : rows[-1] + 1] = decode(self.camera, rows)
                return len(rows)

            pending: set[Future[int]] = set()
            for start in range(0, self.shape[0], BLOCK_FRAMES):
                pending.add(pool.submit(work, np.arange(start, min(start + BLOCK_FRAMES, self.shape[0]))))
                if len(pending) > num_workers:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    advance(sum(future.result() for future in done))
            done, _ = wait(pending)
            advance(sum(future.result() for future in done))
            frames.flush()
            del frames


def fingerprint(metadata: Metadata, image_size: tuple[int, int] | None) -> str:
    """A name for the decoded frames of exactly these files at this size."""
    digest = hashlib.sha256(json.dumps([metadata.info, image_size], sort_keys=True).encode())
    videos = [key for key, feature in metadata.features.items() if feature["dtype"] == "video"]
    files = [path for path, _ in metadata.data_files()]
    files += [path for key in videos for path, _ in metadata.video_files(key)]
    files += sorted((metadata.root / "meta/episodes").glob("*/*.parquet"))
    return file_fingerprint(files, [digest.hexdigest()])


def file_fingerprint(files: Iterable[Path], described: Any) -> str:
    """A name for what was made of exactly these files (by path, size and time) in the way `described`."""
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for path in files:
        stat = os.stat(path) if path.exists() else None
        digest.update(repr((str(path), stat and stat.st_size, stat and stat.st_mtime_ns)).encode())
    return digest.hexdigest()[:20]


def _check_space(folder: Path, caches: Sequence[FrameCache]) -> None:
    needed = sum(int(np.prod(cache.shape)) for cache in caches)
    free = shutil.disk_usage(folder).free
    if needed > 0.95 * free:
        size = "x".join(str(side) for side in caches[0].shape[2:])
        raise LibrobotError(
            f"{folder}: caching the decoded frames ({size}) needs {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free. Set data.cache=none, a smaller data.image_size, fewer "
            "data.cameras, or another folder with the LIBROBOT_CACHE environment variable"
        )
