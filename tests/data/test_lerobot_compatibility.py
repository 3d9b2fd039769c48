"""Against lerobot itself: what it writes reads the same here, what we write reads the same there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lerobot_written import write_with_lerobot

from librobot.data.sources.lerobot import LeRobotSource
from librobot.data.statistics import vector_statistics
from librobot.data.writer import LeRobotWriter
from librobot.types import Camera, Dim, RobotSpec

pytest.importorskip("lerobot")


def open_with_lerobot(root: Path) -> Any:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    # The decoder that is always there; torchcodec needs FFmpeg's shared libraries of the system.
    return LeRobotDataset("somebody/something", root=root, video_backend="pyav")


def assert_same_content(root: Path) -> None:
    """Every frame, in an order that is neither sequential nor sorted."""
    source = LeRobotSource(root)
    reference = open_with_lerobot(root)
    assert len(reference) == source.episode_lengths.sum()
    rows = np.random.default_rng(1).permutation(len(reference))
    images, states = source.images(rows), source.states(rows)
    actions, prompts = source.actions(rows), source.prompts(rows)
    for i, row in enumerate(rows):
        item = reference[int(row)]
        assert prompts[i] == item["task"]
        np.testing.assert_array_equal(states[i], item["observation.state"].reshape(-1).numpy())
        np.testing.assert_array_equal(actions[i], item["action"].reshape(-1).numpy())
        for camera, frames in images.items():
            expected = (item[f"observation.images.{camera}"] * 255).round().byte().numpy()
            np.testing.assert_array_equal(frames[i], expected)


@pytest.mark.parametrize("video", [True, False])
def test_reads_what_lerobot_writes(tmp_path: Path, video: bool) -> None:
    write_with_lerobot(tmp_path / "d", 96, 128, (7, 4, 6), video=video)
    assert_same_content(tmp_path / "d")
    spec = LeRobotSource(tmp_path / "d").spec
    assert spec.name == "so100_follower"
    assert spec.cameras == (Camera("top", 96, 128), Camera("side_cam", 96, 128))
    assert [dim.name for dim in spec.action] == [f"joint_{i}.pos" for i in range(6)]
    assert spec.control_hz == 30


def test_reads_single_dimensions(tmp_path: Path) -> None:
    write_with_lerobot(tmp_path / "d", 32, 32, (3, 2), video=False, state=["lift"], action=["lift"])
    assert_same_content(tmp_path / "d")


@pytest.mark.slow
def test_reads_large_videos_that_lerobot_writes(tmp_path: Path) -> None:
    write_with_lerobot(tmp_path / "d", 480, 640, (12, 9, 15), video=True)
    assert_same_content(tmp_path / "d")


def test_lerobot_reads_our_images(image_dataset: Path, episodes: list[dict[str, Any]]) -> None:
    assert_same_content(image_dataset)
    source = LeRobotSource(image_dataset)
    for camera, frames in source.images(np.arange(source.episode_lengths.sum())).items():
        written = np.concatenate([episode["images"][camera] for episode in episodes])
        np.testing.assert_array_equal(frames.transpose(0, 2, 3, 1), written)


def test_lerobot_reads_our_videos(video_dataset: Path, episodes: list[dict[str, Any]]) -> None:
    assert_same_content(video_dataset)
    source = LeRobotSource(video_dataset)
    for camera, frames in source.images(np.arange(source.episode_lengths.sum())).items():
        written = np.concatenate([episode["images"][camera] for episode in episodes])
        difference = np.abs(frames.transpose(0, 2, 3, 1).astype(int) - written)
        # Lossy: half of the colour resolution (yuv420p) and quantisation. A wrong frame differs by 5 or more.
        assert np.median(difference) <= 2.5
        for own, frame in enumerate(frames.transpose(0, 2, 3, 1).astype(int)):
            distances = np.abs(written.astype(int) - frame).mean(axis=(1, 2, 3))
            assert distances.argmin() == own


def test_lerobot_finds_our_statistics(image_dataset: Path, episodes: list[dict[str, Any]]) -> None:
    stats = open_with_lerobot(image_dataset).meta.stats
    actions = np.concatenate([episode["action"] for episode in episodes])
    exact = vector_statistics(actions)
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(stats["action"][name], exact[name], rtol=1e-6)
    pixels = np.concatenate([episode["images"]["front"] for episode in episodes]) / 255
    front = stats["observation.images.front"]
    assert front["mean"].shape == (3, 1, 1)
    np.testing.assert_allclose(front["mean"].reshape(3), pixels.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(front["std"].reshape(3), pixels.std(axis=(0, 1, 2)), rtol=1e-6)
    assert set(front) == {"min", "max", "mean", "std", "count", "q01", "q10", "q50", "q90", "q99"}


def test_lerobot_can_go_on_recording_into_our_dataset(tmp_path: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    spec = RobotSpec("arm", (Camera("front", 16, 16),), (Dim("s"),), (Dim("a"), Dim("b")), 10.0)
    with LeRobotWriter(tmp_path / "d", spec, fps=10) as writer:
        images = {"front": np.full((3, 16, 16, 3), 9, np.uint8)}
        writer.add_episode(images=images, state=np.ones((3, 1)), action=np.zeros((3, 2)), task="wait")
    dataset = LeRobotDataset.resume("somebody/something", root=tmp_path / "d")
    for value in (10, 20):
        dataset.add_frame(
            {
                "observation.images.front": np.full((16, 16, 3), value, np.uint8),
                "observation.state": np.full(1, value, np.float32),
                "action": np.full(2, value, np.float32),
                "task": "go",
            }
        )
    dataset.save_episode()
    dataset.finalize()
    assert_same_content(tmp_path / "d")
    source = LeRobotSource(tmp_path / "d")
    assert source.prompts(np.array([0, 4])) == ["wait", "go"]
    assert source.images(np.array([4]))["front"][0, 0, 0, 0] == 20
