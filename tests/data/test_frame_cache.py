"""data.cache: the frames of the dataset, made once, by whoever comes first, whole or not at all."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from librobot.data import cache_build, frame_cache
from librobot.data.datamodule import DataModule
from librobot.data.sources.base import CacheOptions
from librobot.data.sources.lerobot import LeRobotSource
from librobot.errors import LibrobotError

ROWS = np.array([3, 19, 0, 3, 7, 12])


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_cache, "PIECE_FRAMES", 4)


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(camera, number of frames) of every stretch that is decoded from the dataset."""
    from librobot.data.camera_frames import CameraFrames

    decoded: list[tuple[str, int]] = []
    original = CameraFrames._decode_into

    def counted(self: Any, camera: str, rows: np.ndarray, *rest: Any) -> None:
        decoded.append((camera, len(rows)))
        original(self, camera, rows, *rest)

    monkeypatch.setattr(CameraFrames, "_decode_into", counted)
    return decoded


def test_raw_frames_are_those_of_the_dataset(
    video_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = LeRobotSource(video_dataset, image_size=(20, 20)).images(ROWS)
    cached = LeRobotSource(video_dataset, image_size=(20, 20), cache="memmap", cache_dir=tmp_path)
    decoded = count_decoded(monkeypatch)
    again = LeRobotSource(video_dataset, image_size=(20, 20), cache="memmap", cache_dir=tmp_path)
    for source in (cached, again, pickle.loads(pickle.dumps(cached))):
        for camera, frames in source.images(ROWS).items():
            np.testing.assert_array_equal(frames, expected[camera])
    assert decoded == []


def test_video_frames_are_near_the_dataset_and_small(tmp_path: Path, video_dataset: Path) -> None:
    options = {"image_size": (24, 40), "cache_dir": tmp_path}
    plain = LeRobotSource(video_dataset, image_size=(24, 40))
    cached = LeRobotSource(video_dataset, cache="video", **options)
    for camera, frames in cached.images(ROWS).items():
        exact = plain.images(ROWS)[camera].astype(float)
        error = np.mean((frames - exact) ** 2)
        assert 10 * np.log10(255**2 / error) > 34, camera
        assert frames.shape == exact.shape
        np.testing.assert_array_equal(frames[exact.sum(axis=(1, 2, 3)) == 0], 0)
    # The borders of the square camera are exactly black: they are not encoded.
    assert not cached.images(ROWS)["wrist"][:, :, :, :8].any()
    assert len(list(tmp_path.rglob("*.mp4"))) == 10


def test_it_goes_on_where_it_was_killed(
    video_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LeRobotSource(video_dataset, cache="memmap", cache_dir=tmp_path)
    (camera,) = tmp_path.glob("*/front")
    whole = (camera / "00002.npy").read_bytes()
    (camera / "00002.npy").unlink()
    (camera / f"00002{'.tmp'}-1.npy").write_bytes(whole[:100])  # what a killed process leaves
    decoded = count_decoded(monkeypatch)
    LeRobotSource(video_dataset, cache="memmap", cache_dir=tmp_path)
    assert decoded == [("front", 4)]
    assert (camera / "00002.npy").read_bytes() == whole
    assert sorted(path.name for path in camera.iterdir()) == [f"{i:05d}.npy" for i in range(5)]


KILLED = """
import sys, time
from librobot.data import frame_cache
frame_cache.PIECE_FRAMES = 4
write = frame_cache.FrameCache.write
def slow(self, piece, frames):
    write(self, piece, frames)
    print("piece", flush=True)
    time.sleep(0.5)
frame_cache.FrameCache.write = slow
from librobot.data.sources.lerobot import LeRobotSource
LeRobotSource(sys.argv[1], cache="memmap", cache_dir=sys.argv[2])
"""


@pytest.mark.slow
def test_a_killed_process_leaves_whole_pieces(video_dataset: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(video_dataset), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("piece")
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = len(list(tmp_path.rglob("*.npy")))
    assert 0 < there < 10
    cached = LeRobotSource(video_dataset, cache="memmap", cache_dir=tmp_path)
    plain = LeRobotSource(video_dataset)
    np.testing.assert_array_equal(cached.images(ROWS)["front"], plain.images(ROWS)["front"])


def test_processes_that_start_at_once_make_it_once(
    video_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = count_decoded(monkeypatch)
    threads = [
        threading.Thread(target=LeRobotSource, args=(video_dataset,), kwargs=kwargs)
        for kwargs in [{"cache": "memmap", "cache_dir": tmp_path}] * 3
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(count for _, count in decoded) == 2 * 20


def test_changed_files_are_another_cache(video_dataset: Path, tmp_path: Path) -> None:
    root = shutil.copytree(video_dataset, tmp_path / "d")
    LeRobotSource(root, cache="memmap", cache_dir=tmp_path / "c")
    video = next(root.rglob("*front*/**/*.mp4"))
    os.utime(video, (1, 1))
    LeRobotSource(root, cache="memmap", cache_dir=tmp_path / "c")
    LeRobotSource(root, cache="memmap", image_size=(8, 8), cache_dir=tmp_path / "c")
    LeRobotSource(root, cache="video", image_size=(8, 8), cache_dir=tmp_path / "c")
    assert len([path for path in (tmp_path / "c").iterdir() if path.is_dir()]) == 4


def test_a_damaged_source_never_poisons_it(video_dataset: Path, tmp_path: Path) -> None:
    """A frame in the middle cannot be decoded: what was decoded is kept, what was not is tried again."""
    root = shutil.copytree(video_dataset, tmp_path / "d")
    video = next(root.rglob("*front*/**/*.mp4"))
    whole = video.read_bytes()
    stamp = video.stat().st_mtime_ns
    with av.open(str(video)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    start, size = places[10]
    video.write_bytes(whole[:start] + bytes(size) + whole[start + size :])
    os.utime(video, ns=(stamp, stamp))
    with pytest.raises(LibrobotError, match=r"front.*file-000\.mp4"):
        LeRobotSource(root, cache="memmap", cache_dir=tmp_path / "c")
    assert len(list((tmp_path / "c").rglob("front/*.npy"))) < 5
    video.write_bytes(whole)
    os.utime(video, ns=(stamp, stamp))
    cached = LeRobotSource(root, cache="memmap", cache_dir=tmp_path / "c")
    plain = LeRobotSource(video_dataset)
    rows = np.arange(20)
    np.testing.assert_array_equal(cached.images(rows)["front"], plain.images(rows)["front"])


def test_files_that_change_meanwhile_are_not_kept(
    video_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(video_dataset, tmp_path / "d")
    video = next(root.rglob("*wrist*/**/*.mp4"))
    from librobot.data.camera_frames import CameraFrames

    original = CameraFrames.decode

    def decode(self: Any, camera: str, rows: np.ndarray) -> np.ndarray:
        os.utime(video, (1, 1))
        return original(self, camera, rows)

    monkeypatch.setattr(CameraFrames, "decode", decode)
    with pytest.raises(LibrobotError, match="files changed while its frames were cached"):
        LeRobotSource(root, cache="memmap", cache_dir=tmp_path / "c")
    assert not list((tmp_path / "c").rglob("*.npy"))


def test_a_limit_removes_what_was_used_longest_ago(video_dataset: Path, tmp_path: Path) -> None:
    def open_at(side: int, gigabytes: float | None = None) -> LeRobotSource:
        options = CacheOptions("memmap", limit_gb=gigabytes)
        return LeRobotSource(video_dataset, image_size=(side, side), cache=options, cache_dir=tmp_path)

    def sides() -> set[int]:
        return {np.load(path, mmap_mode="r").shape[2] for path in tmp_path.rglob("front/00000.npy")}

    first, second = open_at(16), open_at(20)
    third = open_at(12)
    for path, age in zip(sorted(tmp_path.glob("*.used"), key=os.path.getmtime), (30, 20, 10), strict=True):
        os.utime(path, (time.time() - age, time.time() - age))
    del first, third
    gc.collect()
    needed = 2 * 20 * 3 * 24**2
    room = 2 * 20 * 3 * 20**2 + 10_000
    fourth = open_at(24, (needed + room) / 2**30)
    assert sides() == {20, 24}  # 20 is still in use, 16 was the oldest, 12 had to go too
    del fourth
    gc.collect()
    with pytest.raises(LibrobotError, match=r"data.cache_limit_gb is .*Raise it"):
        open_at(28, needed / 2**30)
    np.testing.assert_array_equal(second.images(ROWS)["front"].shape, (6, 3, 20, 20))


def test_training_reads_while_it_is_made(
    video_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not there yet comes from the dataset; the builder is another process, here a function."""
    held: list[Any] = []
    monkeypatch.setattr("librobot.data.cached_frames.build_beside", lambda *arguments: held.append(arguments))
    plain = LeRobotSource(video_dataset)
    source = LeRobotSource(
        video_dataset, cache=CacheOptions("memmap", build="background"), cache_dir=tmp_path
    )
    decoded = count_decoded(monkeypatch)

    def same() -> list[tuple[str, int]]:
        decoded.clear()
        np.testing.assert_array_equal(source.images(ROWS)["front"], expected)
        return list(decoded)

    expected = plain.images(ROWS)["front"]
    assert ("front", 5) in same()
    _, caches, decode, _ = held[0]
    caches[0].write(0, decode("front", caches[0].rows(0)))
    assert ("front", 3) in same()  # rows 0 and 3 are there
    cache_build._beside(*held[0])
    assert same() == []


@pytest.mark.slow
def test_the_builder_beside_training_is_a_process(video_dataset: Path, tmp_path: Path) -> None:
    source = DataModule(
        partial(LeRobotSource, video_dataset, cache_dir=tmp_path), cache="video", cache_build="background"
    ).source
    assert source.images(ROWS)["front"].shape == (6, 3, 32, 48)
    _, builder = source._cache_in_use
    builder.join(60)
    assert builder.exitcode == 0
    assert len(list(tmp_path.rglob("*.mp4"))) == 10


def test_bad_options(video_dataset: Path) -> None:
    for options, message in (
        ({"mode": "raw"}, "none, memmap or video, found 'raw'"),
        ({"mode": "video", "build": "later"}, "ahead or background"),
        ({"mode": "video", "limit_gb": 0}, "above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            CacheOptions(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="found 'raw'"):
        LeRobotSource(video_dataset, cache="raw")  # type: ignore[arg-type]
