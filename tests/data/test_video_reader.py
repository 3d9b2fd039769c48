"""Frames by time: the pixels of a plain decode, whatever the order, width and distance of the keyframes."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from librobot.data.video_reader import FrameNotFound, VideoReader, interleaved, write_planar

FPS = 10


def encode(
    path: Path, frames: int, width: int, options: dict[str, str], height: int = 32, pixels: str = "yuv420p"
) -> Path:
    """H.264, each frame unlike the others."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"threads": "1", **options})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        noise = np.random.default_rng(0).integers(0, 255, (frames, height, width, 3), dtype=np.uint8)
        for picture in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def decoded(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("options", [{"g": "2", "bf": "0"}, {"g": "30", "bf": "0"}, {"g": "12", "bf": "3"}])
def test_any_order_gives_the_frames_of_a_plain_decode(tmp_path: Path, options: dict[str, str]) -> None:
    path = encode(tmp_path / "a.mp4", 40, 48, options)
    plain, reader = decoded(path), VideoReader(path)
    rng = np.random.default_rng(1)
    for index in [*rng.integers(0, 40, 60), *range(40), *range(39, -1, -1), *range(0, 40, 3), 5, 5]:
        np.testing.assert_array_equal(interleaved(reader.frame(index / FPS)), plain[index])


@pytest.mark.parametrize(
    ("pixels", "width"),
    [("yuv420p", width) for width in (16, 18, 24, 30, 32, 40, 48, 56, 98, 640)]
    + [("yuv444p", width) for width in (16, 17, 31, 56, 99, 224)],
)
def test_planes_are_the_same_pixels_at_every_width(tmp_path: Path, pixels: str, width: int) -> None:
    reader = VideoReader(encode(tmp_path / "a.mp4", 3, width, {"g": "2", "bf": "0"}, pixels=pixels))
    for index in range(3):
        frame = reader.frame(index / FPS)
        out = np.full((3, 32, width), 77, np.uint8)
        write_planar(frame, out)
        np.testing.assert_array_equal(out, interleaved(frame).transpose(2, 0, 1))


def test_a_frame_costs_no_more_than_its_group_of_pictures(tmp_path: Path) -> None:
    reader = VideoReader(encode(tmp_path / "a.mp4", 40, 48, {"g": "2", "bf": "0", "sc_threshold": "0"}))
    pulled = 0

    def counted(frames):
        nonlocal pulled
        for frame in frames:
            pulled += 1
            yield frame

    seek = reader._seek
    reader._seek = lambda time: counted(seek(time))  # type: ignore[method-assign]
    for index, cost in ((20, 1), (31, 2), (8, 1), (9, 1), (13, 2), (30, 1), (31, 1), (31, 0)):
        before = pulled
        reader.frame(index / FPS)
        assert pulled - before == cost, index


def test_times_without_a_frame(tmp_path: Path) -> None:
    reader = VideoReader(encode(tmp_path / "a.mp4", 5, 48, {"g": "2", "bf": "0"}))
    with pytest.raises(
        FrameNotFound, match=r"no frame at 0\.2500 s: the nearest frame found is at 0\.3000"
    ) as e:
        reader.frame(0.25)
    assert not e.value.end
    with pytest.raises(FrameNotFound, match=r"no frame at 0\.7000 s") as e:
        reader.frame(0.7)
    assert e.value.end
    assert reader.frame(0.4).pts is not None
