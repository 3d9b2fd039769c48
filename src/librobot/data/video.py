"""Video in and out with PyAV: frames by time, one file per episode, episodes joined without re-encoding."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import UInt8

TOLERANCE = 1e-4
"""How far a frame may lie from the time asked for, in seconds (the format's own tolerance)."""
SEQUENTIAL_FRAMES = 8
"""A frame at most this many ahead is reached by decoding on; farther ones by a seek."""


class FrameNotFound(Exception):
    """The file has no frame at the time asked for; `end` says that it ended before."""

    def __init__(self, message: str, *, end: bool) -> None:
        super().__init__(message)
        self.end = end


class VideoReader:
    """Random access to the frames of one file; reading on from the last frame does not seek.

    One thread per decoder: data workers and the cache builder run several readers side by side instead.
    """

    def __init__(self, path: Path) -> None:
        self.container = av.open(str(path))
        self.stream = self.container.streams.video[0]
        self.stream.codec_context.thread_count = 1
        self.time_base = _time_base(self.stream)
        self.frame_seconds = float(1 / self.stream.average_rate) if self.stream.average_rate else 0.1
        self._frames: Iterator[av.VideoFrame] | None = None
        self._last: tuple[float, UInt8[np.ndarray, "h w 3"]] | None = None

    def frames(
        self, times: Sequence[float], tolerance: float = TOLERANCE
    ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The frames at `times` (seconds, ascending). Raises FrameNotFound."""
        for time in times:
            yield self._frame(float(time), tolerance)

    def _frame(self, time: float, tolerance: float) -> UInt8[np.ndarray, "h w 3"]:
        if self._last is not None and abs(self._last[0] - time) <= tolerance:
            return self._last[1]
        ahead = time - self._last[0] if self._last is not None else -1.0
        if self._frames is None or not 0 < ahead <= SEQUENTIAL_FRAMES * self.frame_seconds:
            self._seek(time)
        last = None
        assert self._frames is not None
        try:
            for frame in self._frames:
                last = float((frame.pts or 0) * self.time_base)
                if abs(last - time) <= tolerance:
                    image = frame.to_ndarray(format="rgb24")
                    self._last = (last, image)
                    return image
                if last > time:
                    break
        except av.FFmpegError as error:
            self._frames = self._last = None
            raise FrameNotFound(f"{error}", end=True) from error
        self._frames = self._last = None
        nearest = "no frame follows" if last is None else f"the nearest frame found is at {last:.4f} s"
        raise FrameNotFound(f"no frame at {time:.4f} s: {nearest}", end=last is None or last < time)

    def _seek(self, time: float) -> None:
        # One tick early: a keyframe exactly at `time` must not be missed through rounding.
        target = max(0, round(time / self.time_base) - 1)
        self.container.seek(target, backward=True, stream=self.stream)
        self._frames = self.container.decode(self.stream)
        self._last = None


def _time_base(stream: av.VideoStream) -> Fraction:
    """Seconds per tick; every stream of a file has one."""
    assert stream.time_base is not None
    return stream.time_base


def count_frames(path: Path) -> int:
    """The number of frames that the file's index announces, 0 where it has none. Raises av.FFmpegError."""
    count = 0
    with av.open(str(path)) as container:
        if container.streams.video:
            count = container.streams.video[0].frames
    return count


def count_whole_frames(path: Path) -> int:
    """The number of frames whose bytes are really there, without decoding."""
    count = 0
    try:
        with av.open(str(path)) as container:
            size = path.stat().st_size
            for packet in container.demux(container.streams.video[0]):
                if packet.size and packet.pos is not None and packet.pos + packet.size <= size:
                    count += not packet.is_corrupt
    except (av.FFmpegError, IndexError):
        pass
    return count


def missing_bytes(path: Path) -> int:
    """By how many bytes an mp4 is shorter than its boxes say (ISO 14496-12, section 4.2); 0 for a whole
    file."""
    size, position = path.stat().st_size, 0
    with path.open("rb") as file:
        while position < size:
            file.seek(position)
            header = file.read(16)
            if len(header) < 8:
                return 8 - len(header)
            length = struct.unpack(">I", header[:4])[0]
            if length == 1 and len(header) == 16:
                length = struct.unpack(">Q", header[8:])[0]
            elif length == 0:  # the box reaches to the end of the file
                return 0
            if length < 8:
                return 0  # not an mp4; opening it will tell
            position += length
    return position - size


@cache
def encoder() -> str:
    """AV1 where this PyAV build has it (what lerobot writes), else H.264."""
    return "libsvtav1" if "libsvtav1" in av.codecs_available else "libx264"


def encoder_options() -> dict[str, str]:
    """A keyframe every second frame (`g`), so that random access decodes at most two."""
    if encoder() == "libsvtav1":
        return {"g": "2", "crf": "30", "preset": "12", "svtav1-params": "fast-decode=0:lp=1"}
    return {"g": "2", "crf": "20", "preset": "veryfast", "bf": "0", "threads": "1"}


def encode_video(path: Path, images: UInt8[np.ndarray, "T h w 3"], fps: int) -> None:
    """Write an mp4 with one frame per image. Height and width must be even (yuv420p)."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(encoder(), rate=fps, options=encoder_options())
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for image in images:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"))
            )
        container.mux(stream.encode(None))


def join_videos(path: Path, parts: Iterable[Path], fps: int) -> int:
    """Join files that `encode_video` wrote into one, packets copied; the number of frames."""
    count = 0
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as output:
        stream = None
        for part in parts:
            with av.open(str(part)) as source:
                track = source.streams.video[0]
                if stream is None:
                    stream = output.add_stream_from_template(track, opaque=True)
                offset = round(Fraction(count, fps) / _time_base(track))
                for packet in source.demux(track):
                    if packet.dts is None or packet.pts is None:  # the flush packet
                        continue
                    packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
                    packet.stream = stream
                    output.mux(packet)
                    count += 1
    return count


def video_info(path: Path, fps: int) -> dict[str, Any]:
    """What info.json says of a video feature."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        info = {
            "video.height": stream.height,
            "video.width": stream.width,
            "video.codec": stream.codec_context.codec.canonical_name,
            "video.pix_fmt": stream.pix_fmt,
            "video.fps": fps,
            "video.channels": 3,
            "has_audio": False,
            "is_depth_map": False,
        }
    options = encoder_options()
    return info | {"video.g": int(options["g"]), "video.crf": int(options["crf"])}
