from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from record_until_killed import NUM_EPISODES, SPEC, make_episode

from librobot.data.files import TEMPORARY
from librobot.data.metadata import STAGING
from librobot.data.sources.lerobot import LeRobotSource
from librobot.data.writer import LeRobotWriter
from librobot.errors import LibrobotError
from librobot.types import Camera, Dim, RobotSpec

RECORDING = str(Path(__file__).with_name("record_until_killed.py"))


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def assert_holds(root: Path, episodes: list[dict[str, Any]], *, lossless: bool = True) -> None:
    """The dataset has exactly these episodes, frame by frame, and nothing that belongs to no dataset."""
    source = LeRobotSource(root)
    rows = np.arange(source.episode_lengths.sum())
    assert source.episode_lengths.tolist() == [len(episode["action"]) for episode in episodes]
    written_state = np.concatenate([episode["state"] for episode in episodes])
    np.testing.assert_array_equal(source.states(rows), written_state)
    written_action = np.concatenate([episode["action"] for episode in episodes])
    np.testing.assert_array_equal(source.actions(rows), written_action)
    assert source.prompts(rows) == [e["task"] for e in episodes for _ in range(len(e["action"]))]
    for camera, frames in source.images(rows).items():
        written = np.concatenate([episode["images"][camera] for episode in episodes])
        found = frames.transpose(0, 2, 3, 1)
        if lossless:
            np.testing.assert_array_equal(found, written)
        else:
            for own, frame in enumerate(found.astype(int)):
                assert np.abs(written - frame).mean(axis=(1, 2, 3)).argmin() == own
    left = [path.name for path in root.rglob("*") if TEMPORARY in path.name or path.name == STAGING]
    assert left == []


def test_images_are_written_and_read_again(image_dataset: Path, episodes: list[dict[str, Any]]) -> None:
    assert_holds(image_dataset, episodes)


def test_videos_are_written_and_read_again(video_dataset: Path, episodes: list[dict[str, Any]]) -> None:
    assert_holds(video_dataset, episodes, lossless=False)


def test_the_description_is_stored(image_dataset: Path, spec: RobotSpec) -> None:
    described = json.loads((image_dataset / "meta/librobot.json").read_text())
    assert RobotSpec.from_dict(described["spec"]) == spec
    assert described["renderer"] == "mujoco-rays"
    source = LeRobotSource(image_dataset)
    assert source.spec == spec
    assert source.provenance["env"] == {"name": "toy"}


@pytest.mark.parametrize("image_format", ["image", "video"])
def test_going_on_after_a_normal_stop(tmp_path: Path, image_format: Any) -> None:
    """New tasks, more frames and files: the first part stays as it is."""
    for first, end in ((0, 2), (2, 2), (2, 5)):
        with LeRobotWriter(tmp_path, SPEC, fps=10, image_format=image_format, resume=True) as writer:
            assert writer.num_episodes == first
            for index in range(first, end):
                assert writer.add_episode(**make_episode(index)) == index
    writer.finalize()
    before = {name: data for name, data in content(tmp_path).items() if name.startswith(("data", "videos"))}
    writer.finalize()
    assert content(tmp_path).items() >= before.items()
    assert_holds(tmp_path, [make_episode(index) for index in range(5)], lossless=image_format == "image")


def test_without_resume_a_recording_is_not_overwritten(image_dataset: Path, spec: RobotSpec) -> None:
    before = content(image_dataset)
    with pytest.raises(LibrobotError, match=r"holds 4 complete and 0 staged episodes.*resume=True"):
        LeRobotWriter(image_dataset, spec, fps=10)
    assert content(image_dataset) == before


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"fps": 20}, "its fps is 10, this recording's is 20"),
        ({"image_format": "video"}, "its feature observation.images.front is"),
        ({"spec": RobotSpec("arm", SPEC.cameras, SPEC.state, (Dim("x"),), 10.0)}, "its feature action is"),
        ({"spec": RobotSpec("arm", (), SPEC.state, SPEC.action, 10.0)}, "its feature observation.images"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_going_on_with_another_recording(
    tmp_path: Path, change: dict[str, Any], part: str, complete: bool
) -> None:
    writer = LeRobotWriter(tmp_path, SPEC, fps=10)
    writer.add_episode(**make_episode(0))
    if complete:
        writer.finalize()
    arguments: dict[str, Any] = {"spec": SPEC, "fps": 10, **change}
    with pytest.raises(LibrobotError) as error:
        LeRobotWriter(tmp_path, resume=True, **arguments)
    assert part in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("resume", [True, False])
def test_a_recording_that_stored_nothing_binds_nobody(tmp_path: Path, resume: bool) -> None:
    """Killed in its first episode: only its settings are left."""
    first = LeRobotWriter(tmp_path, SPEC, fps=10)
    first.add_episode(**make_episode(0))
    (tmp_path / STAGING / "episode-000000.parquet").unlink()
    with LeRobotWriter(tmp_path, SPEC, fps=20, image_format="video", resume=resume) as writer:
        writer.add_episode(**make_episode(3))
    assert_holds(tmp_path, [make_episode(3)], lossless=False)
    assert LeRobotSource(tmp_path).metadata.fps == 20


def check_kills(folder: Path, image_format: str, *renames: str) -> int:
    command = [sys.executable, "-W", "ignore", RECORDING, "kill", str(folder), image_format, *renames]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    episodes = [make_episode(index) for index in range(NUM_EPISODES)]
    assert_holds(folder / "whole", episodes, lossless=image_format == "image")
    whole = content(folder / "whole")
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    for kill in kills:
        found, added = int(kill["resumed"].rstrip(".")), kill["resumed"].count(".")
        assert found >= kill["stored"], kill
        assert found + added == NUM_EPISODES
        assert content(folder / kill["folder"]) == whole, kill
    return len(kills)


def test_a_kill_loses_only_the_episode_being_recorded(tmp_path: Path) -> None:
    """Killed in the second episode, and while the second session is put together: later nobody can tell."""
    assert check_kills(tmp_path, "image", "3", "15") == 4


@pytest.mark.slow
@pytest.mark.parametrize("image_format", ["image", "video"])
def test_a_kill_at_any_rename(tmp_path: Path, image_format: str) -> None:
    assert check_kills(tmp_path, image_format) >= 40


def test_a_kill_from_outside(tmp_path: Path) -> None:
    command = [sys.executable, RECORDING, "record", str(tmp_path / "d"), "video"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(2) == b"0."
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "d/meta/info.json").exists()
    with pytest.raises(LibrobotError, match=r"interrupted; its . staged episodes are whole"):
        LeRobotSource(tmp_path / "d")
    with LeRobotWriter(tmp_path / "d", SPEC, fps=10, image_format="video", resume=True) as writer:
        kept = writer.num_episodes
    assert 1 <= kept <= NUM_EPISODES // 2
    assert_holds(tmp_path / "d", [make_episode(index) for index in range(kept)], lossless=False)


def test_extra_columns(tmp_path: Path) -> None:
    with LeRobotWriter(tmp_path, SPEC, fps=10) as writer:
        writer.add_episode(**make_episode(0), extra={"next.reward": np.arange(3, dtype=np.float32)})
    source = LeRobotSource(tmp_path, state_key="next.reward")
    assert source.metadata.features["next.reward"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"images": {}}, "images of camera 'front' are missing"),
        ({"images": {"front": np.zeros((3, 64, 64, 3), np.float32)}}, "expected uint8 pixels, found float32"),
        ({"images": {"front": np.zeros((3, 32, 64, 3), np.uint8)}}, r"found (3, 32, 64, 3)"),
        ({"action": np.zeros((4, 2))}, "expected shape (4, 64, 64, 3), found (3, 64, 64, 3)"),
        ({"action": np.full((3, 2), np.nan)}, "action: frame 0 is not finite"),
        ({"state": np.zeros((3, 2))}, "state: expected shape (3, 1), found (3, 2)"),
        ({"task": ""}, "found an empty text"),
        ({"extra": {"action": np.zeros((3, 2), np.float32)}}, "extra 'action'"),
        ({"extra": {"timestamp": np.zeros(3, np.float32)}}, "extra 'timestamp'"),
        ({"extra": {"a/b": np.zeros(3, np.float32)}}, "extra 'a/b'"),
    ],
)
def test_an_episode_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], part: str) -> None:
    writer = LeRobotWriter(tmp_path, SPEC, fps=10)
    with pytest.raises(ValueError) as error:
        writer.add_episode(**make_episode(0) | change)
    assert part in str(error.value)
    assert writer.num_episodes == 0
    writer.add_episode(**make_episode(0))
    writer.finalize()
    assert_holds(tmp_path, [make_episode(0)])


@pytest.mark.parametrize(
    "wrong",
    [
        {"fps": 0},
        {"image_format": "gif"},
        {"metadata": {"noise": math.nan}},
        {"metadata": {"noise": np.ones(2)}},
        {"spec": RobotSpec("arm", (Camera("a/b", 8, 8),), SPEC.state, SPEC.action, 10.0)},
    ],
)
def test_bad_arguments(tmp_path: Path, wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"spec": SPEC, "fps": 10, **wrong}
    with pytest.raises(ValueError):
        LeRobotWriter(tmp_path / "d", **arguments)
    assert not (tmp_path / "d").exists()
