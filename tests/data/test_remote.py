"""Datasets at addresses: the same samples as on disk, and no more kept here than allowed."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from librobot.data.datamodule import DataModule
from librobot.data.remote import RemoteFolder, local_root
from librobot.data.sources.lerobot import LeRobotSource
from librobot.errors import LibrobotError

ROWS = np.array([3, 19, 0, 7, 12])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBROBOT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def address(video_dataset: Path) -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    fs.put(str(video_dataset), "/bucket/arm", recursive=True)
    yield "memory://bucket/arm"
    fs.rm("/bucket", recursive=True)


def videos(tmp_path: Path) -> list[str]:
    return sorted(path.parts[-3] for path in (tmp_path / "cache").rglob("*.mp4"))


def test_the_same_samples_as_from_the_disk(video_dataset: Path, address: str, tmp_path: Path) -> None:
    plain, remote = LeRobotSource(video_dataset), LeRobotSource(address, cameras=["front"])
    assert videos(tmp_path) == []  # none is needed yet
    np.testing.assert_array_equal(remote.images(ROWS)["front"], plain.images(ROWS)["front"])
    np.testing.assert_array_equal(remote.actions(ROWS), plain.actions(ROWS))
    assert remote.prompts(ROWS) == plain.prompts(ROWS)
    assert videos(tmp_path) == ["observation.images.front"]
    again = pickle.loads(pickle.dumps(remote))
    np.testing.assert_array_equal(again.images(ROWS)["front"], plain.images(ROWS)["front"])
    assert not list((tmp_path / "cache").rglob("*.tmp-*"))


def test_what_is_here_is_not_copied_again(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    LeRobotSource(address).images(ROWS)
    copied: list[str] = []
    original = RemoteFolder._copy
    monkeypatch.setattr(RemoteFolder, "_copy", lambda self, name: (copied.append(name), original(self, name)))
    LeRobotSource(address).images(ROWS)
    assert copied == []
    fs = fsspec.filesystem("memory")
    (name,) = [name for name in fs.find("/bucket/arm") if "wrist" in name]
    fs.pipe(name, fs.cat(name))  # another version with the same bytes
    LeRobotSource(address).images(ROWS)
    assert [name.rpartition("/")[2] for name in copied] == ["file-000.mp4"]


def test_a_limit_keeps_the_newest_videos(video_dataset: Path, address: str, tmp_path: Path) -> None:
    sizes = {path.parts[-3][-5:]: path.stat().st_size for path in video_dataset.rglob("*.mp4")}
    limit = max(sizes.values()) / 2**30
    plain, remote = LeRobotSource(video_dataset), LeRobotSource(address, local_cache_gb=limit)
    for rows in (ROWS, ROWS + 0):
        for camera, frames in remote.images(rows).items():
            np.testing.assert_array_equal(frames, plain.images(rows)[camera])
    (kept,) = videos(tmp_path)  # two cameras, room for one
    gone = next(name for name in plain.spec.camera_names if not kept.endswith(name))
    with pytest.raises(LibrobotError, match=r"do not fit into data.source.local_cache_gb=.*raise it"):
        LeRobotSource(address, local_cache_gb=1e-9)._frames.decode(gone, np.array([0]))


def test_a_cut_connection_leaves_nothing(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = LeRobotSource(address)
    name = next(name for name in source._remote.files if name.endswith(".mp4"))  # type: ignore[union-attr]
    size, version = source._remote.files[name]  # type: ignore[union-attr]
    source._remote.files[name] = (size + 1, version)  # type: ignore[union-attr]
    with pytest.raises(LibrobotError, match=rf"{name}: expected {size + 1} bytes, found {size}"):
        source.images(ROWS)
    assert not [path for path in videos(tmp_path) if path == name.split("/")[1]]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nothing/here", "no files there"),
        ("nosuch://a/b", "addresses of nosuch:// are not known"),
    ],
)
def test_addresses_that_lead_nowhere(url: str, message: str) -> None:
    with pytest.raises(LibrobotError, match=message):
        LeRobotSource(url)


def test_other_formats_are_copied_whole(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/shelf/a/x.txt", b"one")
    fs.pipe("/shelf/a/b/y.txt", b"two")
    folder = local_root("memory://shelf/a")
    assert (folder / "x.txt").read_text() == "one"
    assert (folder / "b/y.txt").read_text() == "two"
    assert local_root(f"file://{tmp_path}") == local_root(tmp_path) == tmp_path
    fs.rm("/shelf", recursive=True)


@pytest.mark.slow
def test_data_workers_read_from_it(video_dataset: Path, tmp_path: Path) -> None:
    """A local folder behind a protocol of fsspec, as workers of other processes can reach it."""
    shutil.copytree(video_dataset, tmp_path / "there")

    def pixels(root: str) -> list[int]:
        module = DataModule(LeRobotSource(root), batch_size=5, num_workers=2, drop_last=False)
        module.configure(horizon=2)
        return [int(batch.observation.images["front"].long().sum()) for batch in module.train_dataloader()]

    assert pixels(f"local://{tmp_path / 'there'}") == pixels(str(video_dataset))
