"""Making a frame cache: ahead of training or beside it, by one process at a time, within a limit."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from librobot.data.files import locked, remove_temporaries
from librobot.data.frame_cache import FrameCache
from librobot.errors import LibrobotError
from librobot.progress import ProgressBar

NICE = 10
"""By how much a builder beside training gives way to it."""

Decode = Callable[[str, np.ndarray], np.ndarray]
Unchanged = Callable[[], bool]


def build(folder: Path, caches: Sequence[FrameCache], decode: Decode, unchanged: Unchanged) -> None:
    """Make the pieces that are missing, on all cores, with a progress bar. `decode(camera, rows)` must be
    safe in threads. `unchanged()`: whether the dataset's files are still those that the folder is named
    after.

    Killed, it goes on with the next piece. Processes that start at once wait for the first to finish. A piece
    that cannot be decoded, or whose files changed meanwhile, is not kept: LibrobotError.
    """
    if not any(cache.missing() for cache in caches):
        return
    with locked(lock_of(folder)):
        _build(folder, caches, decode, unchanged)


def _build(folder: Path, caches: Sequence[FrameCache], decode: Decode, unchanged: Unchanged) -> None:
    work = [(cache, piece) for cache in caches for piece in cache.missing()]
    if not work:
        return
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporaries(folder)
    check_space(folder, caches)

    def make(cache: FrameCache, piece: int) -> int:
        frames = decode(cache.camera, cache.rows(piece))
        if not unchanged():
            raise LibrobotError(
                f"{folder}: the dataset's files changed while its frames were cached; start again when they "
                "are complete"
            )
        cache.write(piece, frames)
        return len(frames)

    num_workers = len(os.sched_getaffinity(0))
    total = sum(len(cache.rows(piece)) for cache, piece in work)
    pending: set[Future[int]] = set()
    with ProgressBar("decoding frames", total) as progress, ThreadPoolExecutor(num_workers) as pool:
        try:
            for cache, piece in work:
                pending.add(pool.submit(make, cache, piece))
                if len(pending) > num_workers:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    progress.advance(sum(future.result() for future in done))
            done, _ = wait(pending)
            progress.advance(sum(future.result() for future in done))
        finally:
            for future in pending:
                future.cancel()


def build_beside(folder: Path, caches: Sequence[FrameCache], decode: Decode, unchanged: Unchanged) -> Any:
    """The same in a process of low priority that ends with this one; None where all is there."""
    if not any(cache.missing() for cache in caches):
        return None
    # Not forked: decoders and threads of this process must not be there twice.
    process = multiprocessing.get_context("spawn").Process(
        target=_beside, args=(folder, list(caches), decode, unchanged), daemon=True, name="frame-cache"
    )
    process.start()
    return process


def _beside(folder: Path, caches: Sequence[FrameCache], decode: Decode, unchanged: Unchanged) -> None:
    os.nice(NICE)
    lock_of(folder).parent.mkdir(parents=True, exist_ok=True)
    with lock_of(folder).open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return  # another process makes it already
        try:
            _build(folder, caches, decode, unchanged)
        except LibrobotError as error:
            print(f"the frame cache is left incomplete: {error}", file=sys.stderr)


def lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def use(folder: Path) -> IO[str]:
    """Mark the cache as in use, until the handle is closed or the process ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    handle = folder.with_name(f"{folder.name}.used").open("a")
    fcntl.flock(handle, fcntl.LOCK_SH)
    os.utime(handle.fileno())
    return handle


def make_room(folder: Path, caches: Sequence[FrameCache], limit_gb: float | None) -> None:
    """Remove the caches beside `folder` that were used least recently, until all with what is missing here
    take at most `limit_gb`; those in use are kept. Raises LibrobotError where that is not enough."""
    if limit_gb is None:
        return
    limit = limit_gb * 2**30
    own = sum(cache.estimated_bytes(cache.pieces) for cache in caches)
    others = [path for path in folder.parent.glob("*.used") if path.stem != folder.name]
    sizes = {path: folder_bytes(path.with_suffix("")) for path in others}
    for path in sorted(others, key=lambda path: path.stat().st_mtime):
        if own + sum(sizes.values()) <= limit:
            return
        with unused(path) as free:
            if free:
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                path.unlink(missing_ok=True)
                sizes[path] = 0
    if own + sum(sizes.values()) > limit:
        raise LibrobotError(
            f"{folder.parent}: this dataset's frames take about {own / 2**30:.2g} GiB, caches in use "
            f"{sum(sizes.values()) / 2**30:.2g} GiB, data.cache_limit_gb is {limit_gb:g}. Raise it, or take "
            "data.cache=none, data.cache=video or a smaller data.image_size"
        )


@contextmanager
def unused(path: Path) -> Any:
    """Whether no process uses the cache of this mark; none can begin to inside the block."""
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_space(folder: Path, caches: Sequence[FrameCache]) -> None:
    needed = sum(cache.estimated_bytes(len(cache.missing())) for cache in caches)
    free = shutil.disk_usage(folder).free
    if needed > 0.95 * free:
        size = "x".join(str(side) for side in caches[0].shape[2:])
        raise LibrobotError(
            f"{folder}: caching the decoded frames ({size}) needs {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free. Set data.cache=none, a smaller data.image_size, fewer "
            "data.cameras, or another folder with the LIBROBOT_CACHE environment variable"
        )
