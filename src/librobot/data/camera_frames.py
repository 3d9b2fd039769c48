"""A batch's pictures out of the columns of a dataset: each frame decoded once, cameras side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np
from av import VideoFrame
from jaxtyping import Int, UInt8
from torch.utils.data import get_worker_info

from librobot.data import shared_memory
from librobot.data.frame_cache import FrameCache
from librobot.data.images import resize_with_padding
from librobot.data.video_reader import write_planar
from librobot.errors import LibrobotError
from librobot.types import Camera


class Column(Protocol):
    """A camera's frames as stored."""

    def read(self, rows: Int[np.ndarray, " n"]) -> Iterable[UInt8[np.ndarray, "h w 3"]]:
        """The frames of ascending `rows`."""


@runtime_checkable
class VideoFrames(Protocol):
    """What a column of videos has besides."""

    def frames(self, rows: Int[np.ndarray, " n"]) -> Iterable[VideoFrame]:
        """The frames of ascending `rows` as the decoder gives them."""


class ChosenRows:
    """The column of a dataset of which some episodes are left out."""

    def __init__(self, column: Column, rows: Int[np.ndarray, " n"]) -> None:
        self.column, self.rows = column, rows

    def read(self, rows: Int[np.ndarray, " n"]) -> Iterable[UInt8[np.ndarray, "h w 3"]]:
        return self.column.read(self.rows[rows])


class ChosenFrames(ChosenRows):
    """The same for a column of videos."""

    def frames(self, rows: Int[np.ndarray, " n"]) -> Iterable[VideoFrame]:
        assert isinstance(self.column, VideoFrames)
        return self.column.frames(self.rows[rows])


def chosen(column: Column, rows: Int[np.ndarray, " n"]) -> Column:
    """Only `rows` of the column, numbered anew."""
    return ChosenFrames(column, rows) if isinstance(column, VideoFrames) else ChosenRows(column, rows)


class CameraFrames:
    """Frames of `cameras` at the sizes that they name. image_size: resize to it, aspect kept; without it a
    frame of another size is an error. where(row): the place of a row, for errors. total: of rows. caches:
    frames that need not be decoded again; what one does not have yet comes from the column.

    Rows are read in ascending order, whatever the order asked for, so that frames of one file and one group
    of pictures share their decoding; a row that comes twice is read once. Where the process has cores to
    spare, every camera has a thread of its own, which keeps its open decoders.
    """

    def __init__(
        self,
        columns: Mapping[str, Column],
        cameras: Sequence[Camera],
        image_size: tuple[int, int] | None,
        where: Callable[[int], str],
        total: int,
    ) -> None:
        self.columns = {camera.name: columns[camera.name] for camera in cameras}
        self.sizes = {camera.name: (camera.height, camera.width) for camera in cameras}
        self.image_size, self.where, self.total = image_size, where, total
        self.caches: dict[str, FrameCache] = {}
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._process = 0

    def read(self, rows: Int[np.ndarray, " n"]) -> dict[str, UInt8[np.ndarray, "n c h w"]]:
        """Every camera's frames of `rows`, in their order."""
        if len(self.columns) < 2 or spare_cores() < 2:
            outputs = {camera: self._empty(camera, len(rows)) for camera in self.columns}
            for camera, out in outputs.items():
                self._read_into(camera, rows, out)
            return outputs
        if self._process != os.getpid():  # threads do not survive a fork
            self._threads = {camera: ThreadPoolExecutor(1, f"camera-{camera}") for camera in self.columns}
            self._process = os.getpid()
        outputs = {camera: self._empty(camera, len(rows)) for camera in self.columns}
        started = {
            camera: thread.submit(self._read_into, camera, rows, outputs[camera])
            for camera, thread in self._threads.items()
        }
        for future in started.values():
            future.result()
        return outputs

    def decode(self, camera: str, rows: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n c h w"]:
        """The frames of ascending `rows`, decoded and resized, past any cache."""
        out = np.empty((len(rows), 3, *self.sizes[camera]), np.uint8)
        self._decode_into(camera, rows, out, np.arange(len(rows)))
        return out

    def _empty(self, camera: str, count: int) -> UInt8[np.ndarray, "n c h w"]:
        return shared_memory.empty((count, 3, *self.sizes[camera]))

    def _read_into(self, camera: str, rows: Int[np.ndarray, " n"], out: UInt8[np.ndarray, "n c h w"]) -> None:
        ascending, first, back = np.unique(rows, return_index=True, return_inverse=True)
        cache = self.caches.get(camera)
        if cache is None:
            self._decode_into(camera, ascending, out, first)
        else:
            here = cache.available(ascending)
            cache.read_into(ascending[here], out, first[here])
            if not here.all():
                self._decode_into(camera, ascending[~here], out, first[~here])
        source = first[back.reshape(-1)]
        for place in np.flatnonzero(source != np.arange(len(rows))):  # a window repeats its first frame
            out[place] = out[source[place]]

    def _decode_into(
        self,
        camera: str,
        rows: Int[np.ndarray, " n"],
        out: UInt8[np.ndarray, "m c h w"],
        places: Int[np.ndarray, " n"],
    ) -> None:
        """The frames of ascending `rows` into out[places]."""
        column = self.columns[camera]
        if self.image_size is None and isinstance(column, VideoFrames):
            for place, row, frame in zip(places, rows, column.frames(rows), strict=True):
                self._check(camera, int(row), frame.height, frame.width)
                write_planar(frame, out[place])
            return
        for place, row, image in zip(places, rows, column.read(rows), strict=True):
            if self.image_size is not None:
                image = resize_with_padding(image, *self.image_size)
            self._check(camera, int(row), *image.shape[:2])
            out[place] = image.transpose(2, 0, 1)

    def _check(self, camera: str, row: int, height: int, width: int) -> None:
        if (height, width) != self.sizes[camera]:
            raise LibrobotError(
                f"{self.where(row)}: camera {camera}: expected {self.sizes[camera][0]} x "
                f"{self.sizes[camera][1]} pixels, found {height} x {width}; set image_size"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_threads": {}, "_process": 0}


def spare_cores() -> int:
    """The cores that this process may use, shared among the data workers where it is one."""
    worker = get_worker_info()
    return len(os.sched_getaffinity(0)) // (worker.num_workers if worker is not None else 1)
