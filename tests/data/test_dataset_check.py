"""What `librobot-data check` finds, each with its place; a sound dataset gives nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic import make_episode
from test_lerobot_v2 import VIDEO, write_v21

from librobot.data.check import check
from librobot.data.sources.lerobot import LeRobotSource
from librobot.data.video import encode_video
from librobot.data.writer import LeRobotWriter
from librobot.types import RobotSpec


def smooth(spec: RobotSpec, lengths: tuple[int, ...] = (30, 30)) -> list[dict[str, Any]]:
    made = []
    for number, length in enumerate(lengths):
        episode = make_episode(spec, number, length)
        for key in ("state", "action"):
            ramp = np.linspace(0, 1, length, dtype=np.float32)[:, None]
            episode[key] = ramp * (1 + np.arange(episode[key].shape[1], dtype=np.float32))
        made.append(episode)
    return made


def write(root: Path, spec: RobotSpec, episodes: list[dict[str, Any]]) -> LeRobotSource:
    with LeRobotWriter(root, spec, fps=10) as writer:
        for episode in episodes:
            writer.add_episode(**episode)
    return LeRobotSource(root)


def test_a_sound_dataset(tmp_path: Path, spec: RobotSpec) -> None:
    assert check(write(tmp_path / "d", spec, smooth(spec)), show=False) == []


def test_values(tmp_path: Path, spec: RobotSpec) -> None:
    episodes = smooth(spec, (30, 30, 1))
    episodes[1]["state"][12:, 1] += 40
    for episode in episodes:
        episode["action"][:, 1] = 0.25
    episodes[2]["task"] = " "
    found = [str(finding) for finding in check(write(tmp_path / "d", spec, episodes), show=False)]
    assert any(f.startswith("jump: state 'joint_1', episode 1, frame 12: goes from") for f in found)
    assert "constant: action 'gripper': is 0.25 in every frame" in found
    assert "short: episode 2: has one frame" in found
    assert "instruction: episode 2: is empty, as in 1 episodes" in found


def test_cameras(tmp_path: Path, spec: RobotSpec) -> None:
    episodes = smooth(spec)
    episodes[0]["images"]["wrist"][:] = 3
    episodes[1]["images"]["front"][:] = episodes[1]["images"]["front"][:1]
    found = [str(finding) for finding in check(write(tmp_path / "d", spec, episodes), show=False)]
    assert found == [
        "black: camera wrist, episode 0: every picture looked at is black",
        "frozen: camera front, episode 1: does not change, the state does",
    ]


@pytest.mark.parametrize(
    ("factor", "message"), [(2.0, "frame 1: expected 0.1 s at 10 Hz, found 0.2 s"), (0, "after the last")]
)
def test_timestamps(tmp_path: Path, spec: RobotSpec, factor: float, message: str) -> None:
    root = tmp_path / "d"
    write(root, spec, smooth(spec))
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    times = table["timestamp"].to_numpy() * np.where(table["episode_index"].to_numpy() == 1, factor, 1)
    column = table.schema.get_field_index("timestamp")
    table = table.set_column(column, "timestamp", pa.array(times.astype(np.float32)))
    pq.write_table(table, path, row_group_size=30)
    (found,) = check(LeRobotSource(root), show=False)
    assert str(found).startswith("timestamps: episode 1, frame 1: ")
    assert message in str(found)


def test_a_video_longer_than_its_episode(tmp_path: Path, spec: RobotSpec) -> None:
    root = write_v21(tmp_path / "v21", spec, smooth(spec))
    frames = make_episode(spec, 0, 33)["images"]["front"]
    encode_video(root / f"videos/chunk-000/{VIDEO}/episode_000001.mp4", frames, 10)
    (found,) = check(LeRobotSource(root), show=False)
    assert str(found).endswith("episode_000001.mp4: has 33 frames, its episodes 1 to 1 30")


def test_the_commands(tmp_path: Path, spec: RobotSpec) -> None:
    """check and convert open what they find by its files."""
    write(tmp_path / "d", spec, smooth(spec))

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "librobot.cli.data", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    done = run("convert", "d", "out", "--to", "hdf5")
    assert (done.returncode, done.stderr.strip().rpartition("left")[0][:15]) == (0, "writing out 2/2")
    done = run("check", "out", "prompt=stop")
    assert (done.returncode, done.stdout.strip()) == (0, "nothing found")
    done = run("convert", "out", "again", "--to", "zarr", "--from", "alohaa")
    assert done.returncode == 2
    assert "aloha" in done.stderr
    assert json.loads((tmp_path / "d/meta/info.json").read_text())["total_episodes"] == 2
