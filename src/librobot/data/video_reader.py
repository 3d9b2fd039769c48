"""Frames of a video by time: seeks to the right keyframe, decodes on where that is shorter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8

TOLERANCE = 1e-4
"""How far a frame may lie from the time asked for, in seconds (the format's own tolerance)."""

BACK_SECONDS = 2.0
"""How much earlier to seek where the keyframe found comes after the frame (files whose index is in decoding
order)."""


class FrameNotFound(Exception):
    """The file has no frame at the time asked for; `end` says that it ended before."""

    def __init__(self, message: str, *, end: bool) -> None:
        super().__init__(message)
        self.end = end


class VideoReader:
    """Random access to the frames of one file.

    The next frame is decoded without a seek; one farther ahead too, while that costs less than the average
    seek, whose cost (frames decoded from the keyframe on) the reader learns from those that it makes. With a
    keyframe every second frame, a single frame costs 1.5 decoded ones, and its neighbour then none or one.

    One thread per decoder: data workers, cameras and the cache builder run several readers side by side.
    """

    def __init__(self, path: Path) -> None:
        self.container = av.open(str(path))
        self.stream = self.container.streams.video[0]
        self.stream.codec_context.thread_count = 1
        assert self.stream.time_base is not None
        self.tick = float(self.stream.time_base)
        rate = self.stream.average_rate
        self.frame_seconds = float(1 / rate) if rate else 0.1
        self.span = 1
        """The most frames that one seek has decoded: at least the distance of two keyframes, at last."""
        self._frames: Iterator[av.VideoFrame] | None = None
        self._last: tuple[float, av.VideoFrame] | None = None

    def frame(self, time: float, tolerance: float = TOLERANCE) -> av.VideoFrame:
        """The frame at `time`, in seconds. Raises FrameNotFound."""
        if self._last is not None and abs(self._last[0] - time) <= tolerance:
            return self._last[1]
        try:
            return self._find(time, tolerance)
        except av.FFmpegError as error:
            self._frames = self._last = None
            raise FrameNotFound(f"{error}", end=True) from error

    def _find(self, time: float, tolerance: float) -> av.VideoFrame:
        ahead = (time - self._last[0]) / self.frame_seconds if self._last is not None else -1.0
        if self._frames is not None and 0 < ahead <= max(1.5, self.span / 2):
            found, nearest = self._decode_to(time, tolerance)
            if found is not None:
                return found
        nearest = None
        for back in (0.0, BACK_SECONDS, time):
            self._frames = self._seek(time + tolerance - back)
            found, nearest = self._decode_to(time, tolerance)
            if found is not None:
                return found
            if nearest is None or nearest < time or back >= time:
                break
        where = "no frame follows" if nearest is None else f"the nearest frame found is at {nearest:.4f} s"
        end = nearest is None or nearest < time
        raise FrameNotFound(f"no frame at {time:.4f} s: {where}", end=end)

    def _seek(self, time: float) -> Iterator[av.VideoFrame]:
        """Frames from the last keyframe on that is not after `time`."""
        target = max(0, int(time / self.tick))
        self.container.seek(target, backward=True, stream=self.stream)
        return self.container.decode(self.stream)

    def _decode_to(self, time: float, tolerance: float) -> tuple[av.VideoFrame | None, float | None]:
        """The frame at `time`, and the time of the last one decoded, None where there was none."""
        last = None
        assert self._frames is not None
        for decoded, frame in enumerate(self._frames, 1):
            last = (frame.pts or 0) * self.tick
            if abs(last - time) <= tolerance:
                self.span = max(self.span, decoded)
                self._last = (last, frame)
                return frame, last
            if last > time:
                break
        self._frames = self._last = None
        return None, last


PLANAR_WIDTH = 16
"""swscale writes yuv420p to planes of RGB faster than to RGB, with the same values; but of a row that is no
multiple of this it leaves the end out. yuv444p has another way through it, whole at any width."""


def write_planar(frame: av.VideoFrame, out: UInt8[np.ndarray, "3 h w"]) -> None:
    """The RGB pixels, one colour after another: `interleaved`, transposed."""
    whole = frame.format.name == "yuv444p" or (
        frame.format.name == "yuv420p" and frame.width % PLANAR_WIDTH == 0
    )
    if not whole:
        out[:] = interleaved(frame).transpose(2, 0, 1)
        return
    planes = frame.reformat(format="gbrp").planes
    for channel, plane in enumerate((planes[2], planes[0], planes[1])):
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        out[channel] = rows[:, : plane.width]


def interleaved(frame: av.VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels as RGB, row by row."""
    return frame.to_ndarray(format="rgb24")
