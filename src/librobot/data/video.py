"""Video files with PyAV: what they hold, one file per episode, episodes joined without re-encoding."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import UInt8


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


def copy_span(path: Path, target: Path, begin: float, frames: int, fps: float) -> bool:
    """Write the `frames` frames from `begin` (seconds) on to a file of their own, packets copied.

    False where that cannot be: the first is no keyframe, packets are not in the order of their frames, or
    some are missing. `target` is then not to be used.
    """
    count, whole = 0, True
    with av.open(str(path)) as source, av.open(str(target), "w", format="mp4") as output:
        track = source.streams.video[0]
        base = _time_base(track)
        first = round(Fraction(begin) / base)
        half = Fraction(1, 2) / Fraction(fps) / base
        stream = output.add_stream_from_template(track, opaque=True)
        source.seek(max(0, int(first + half) - 1), backward=True, stream=track)
        for packet in source.demux(track):
            if packet.pts is None or packet.pts < first - half:
                continue
            whole = packet.pts == packet.dts and (count > 0 or packet.is_keyframe)
            if not whole or packet.pts >= first + (2 * frames - 1) * half:
                break
            packet.pts = packet.dts = packet.pts - first
            packet.stream = stream
            output.mux(packet)
            count += 1
    return whole and count == frames


def stream_format(path: Path) -> tuple[Any, ...]:
    """What two files must have in common for their packets to lie in one."""
    found: tuple[Any, ...] = ()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        found = codec.name, stream.width, stream.height, stream.pix_fmt, codec.extradata, stream.time_base
    return found
