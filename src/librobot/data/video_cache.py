"""A camera's frames as small video that decodes fast: H.264 with a keyframe every second frame.

Chosen by measurement on 480x640 AV1 footage of 16 kB a frame, resized to 168x224 (milliseconds on one core
for a frame in random order; bytes a frame; PSNR over RGB against the resized original):

    H.264 4:4:4, keyframe every 2nd, crf 18    0.7 ms    4.2 kB    39.4 dB    <- this one
    H.264 4:2:0, keyframe every 2nd, crf 17    0.4 ms    4.4 kB    37.0 dB
    H.264 4:4:4, keyframe every 4th, crf 17    0.8 ms    2.7 kB    40.9 dB
    AV1 4:2:0, keyframe every 2nd, crf 20      0.7 ms    4.4 kB    37.3 dB
    JPEG 4:4:4, quality 85                     0.2 ms    9.3 kB    40.3 dB
    raw (cache=memmap)                         0.0 ms  112.9 kB

Chroma is kept whole, since a resized picture has as much of it as the original. Without the deblocking filter
and with variable-length codes (`fastdecode`), as decoders are fastest.
"""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from jaxtyping import Int, UInt8

from librobot.data.files import written_whole
from librobot.data.frame_cache import FrameCache
from librobot.data.images import inner_size
from librobot.data.local_cache import LocalCache
from librobot.data.video_reader import VideoReader, write_planar
from librobot.errors import LibrobotError

FPS = 30
CODEC = "libx264"
OPTIONS = {"g": "2", "bf": "0", "crf": "18", "preset": "medium", "tune": "fastdecode", "threads": "1"}
VERSION = 1
"""Of the settings above, which are part of the cache's name."""

OPEN_PIECES = 32
"""Decoders per camera and thread."""


class VideoCache(FrameCache):
    """stored: the camera's (height, width) in the dataset, from which follow the black borders, which are not
    encoded."""

    suffix = ".mp4"

    def __init__(
        self, folder: Path, camera: str, shape: tuple[int, int, int, int], stored: tuple[int, int]
    ) -> None:
        super().__init__(folder, camera, shape)
        height, width = inner_size(stored, (shape[2], shape[3]))
        self.box = (shape[2] - height) // 2, (shape[3] - width) // 2, height, width
        self._readers = LocalCache(self._read_piece, capacity=OPEN_PIECES)

    def read_into(
        self,
        rows: Int[np.ndarray, " n"],
        out: UInt8[np.ndarray, "m c h w"],
        places: Int[np.ndarray, " n"],
    ) -> None:
        top, left, height, width = self.box
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            piece, number = divmod(row, self.piece_frames)
            frame = self._readers(piece).frame(number / FPS)
            picture = out[place]
            if (frame.height, frame.width) != self.shape[2:]:
                picture[:] = 0
                picture = picture[:, top : top + height, left : left + width]
            write_planar(frame, picture)

    def write(self, piece: int, frames: UInt8[np.ndarray, "n c h w"]) -> None:
        top, left, height, width = self.box
        inner = frames[:, :, top : top + height, left : left + width]
        if np.count_nonzero(inner) != np.count_nonzero(frames):  # a picture of other proportions
            inner = frames
        with written_whole(self.path(piece)) as temporary:
            encode(temporary, inner.transpose(0, 2, 3, 1))

    def estimated_bytes(self, pieces: int) -> int:
        return super().estimated_bytes(pieces) // 20

    def _read_piece(self, piece: int) -> VideoReader:
        return VideoReader(self.path(piece))


def encode(path: Path, pictures: UInt8[np.ndarray, "n h w 3"]) -> None:
    """Raises LibrobotError where PyAV comes without the encoder, or frames got lost."""
    if CODEC not in av.codecs_available:
        raise LibrobotError(
            f"data.cache=video needs PyAV with {CODEC}, which this build ({av.__version__}) lacks; take "
            "data.cache=memmap"
        )
    packets = 0
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(CODEC, rate=FPS, options=OPTIONS)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv444p"
        for picture in pictures:
            made = stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"))
            packets += len(made)
            container.mux(made)
        made = stream.encode(None)
        container.mux(made)
    if packets + len(made) != len(pictures):
        raise LibrobotError(f"{path}: {len(pictures)} frames went in, {packets + len(made)} came out")
