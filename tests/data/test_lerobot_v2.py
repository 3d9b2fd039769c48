"""LeRobotDataset v2.1: read as it is, and as lerobot's converter and reader see the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from librobot.data.images import encode_png
from librobot.data.sources.lerobot import LeRobotSource
from librobot.data.statistics import image_statistics, vector_statistics
from librobot.data.video import encode_video
from librobot.errors import LibrobotError
from librobot.types import RobotSpec

VIDEO = "observation.images.front"
IMAGE = "observation.images.wrist"
TASK_INDEX = {"pick the red cube": 0, "open the drawer": 1, "press the button": 2}


def write_v21(root: Path, spec: RobotSpec, episodes: list[dict[str, Any]], version: str = "v2.1") -> Path:
    """What lerobot 0.3 wrote, with one camera as video and one as images; chunks of two episodes."""
    info_features: dict[str, Any] = {
        VIDEO: {"dtype": "video", "shape": [32, 48, 3], "names": ["height", "width", "channels"]},
        IMAGE: {"dtype": "image", "shape": [24, 24, 3], "names": ["height", "width", "channels"]},
        "observation.state": {"dtype": "float32", "shape": [4], "names": [d.name for d in spec.state]},
        "action": {"dtype": "float32", "shape": [2], "names": {"motors": [d.name for d in spec.action]}},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **{
            key: {"dtype": "int64", "shape": [1], "names": None}
            for key in ("frame_index", "episode_index", "index", "task_index")
        },
    }
    meta, start, lines, stats_lines = root / "meta", 0, [], []
    meta.mkdir(parents=True)
    for number, episode in enumerate(episodes):
        length = len(episode["action"])
        folder = root / f"data/chunk-{number // 2:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        frames = np.arange(length)
        columns = {
            "observation.state": list(episode["state"]),
            "action": list(episode["action"]),
            "timestamp": (frames / 10).astype(np.float32),
            "frame_index": frames,
            "episode_index": np.full(length, number),
            "index": start + frames,
            "task_index": np.full(length, TASK_INDEX[episode["task"]]),
        }
        images = pa.array([{"bytes": encode_png(i), "path": None} for i in episode["images"]["wrist"]])
        table = pa.table({key: pa.array(value) for key, value in columns.items()} | {IMAGE: images})
        pq.write_table(table, folder / f"episode_{number:06d}.parquet")
        video = root / f"videos/chunk-{number // 2:03d}/{VIDEO}/episode_{number:06d}.mp4"
        video.parent.mkdir(parents=True, exist_ok=True)
        encode_video(video, episode["images"]["front"], 10)
        lines.append({"episode_index": number, "tasks": [episode["task"]], "length": length})
        stats = {
            key: vector_statistics(np.asarray(columns[key], np.float64).reshape(length, -1))
            | {"count": np.array([length])}
            for key in columns
        }
        stats |= {key: image_statistics(episode["images"][key.split(".")[-1]]) for key in (VIDEO, IMAGE)}
        plain = {
            key: {name: value.tolist() for name, value in part.items() if not name.startswith("q")}
            for key, part in stats.items()
        }
        stats_lines.append({"episode_index": number, "stats": plain})
        start += length
    tasks = [{"task_index": index, "task": task} for task, index in TASK_INDEX.items()]
    for name, rows in (("episodes", lines), ("tasks", tasks), ("episodes_stats", stats_lines)):
        (meta / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = {
        "codebase_version": version,
        "robot_type": "arm",
        "total_episodes": len(episodes),
        "total_frames": start,
        "total_tasks": 3,
        "total_videos": len(episodes),
        "total_chunks": 2,
        "chunks_size": 2,
        "fps": 10,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": info_features,
    }
    (meta / "info.json").write_text(json.dumps(info))
    return root


@pytest.fixture
def v21(tmp_path: Path, spec: RobotSpec, episodes: list[dict[str, Any]]) -> Path:
    return write_v21(tmp_path / "v21", spec, episodes)


def test_every_value_is_what_was_written(v21: Path, episodes: list[dict[str, Any]]) -> None:
    source = LeRobotSource(v21)
    rows = np.arange(source.episode_lengths.sum())
    assert source.episode_lengths.tolist() == [5, 1, 8, 6]
    assert source.spec.camera_names == ("front", "wrist")
    assert [dim.name for dim in source.spec.action] == ["x", "gripper"]
    assert source.spec.control_hz == 10
    for found, key in ((source.states(rows), "state"), (source.actions(rows), "action")):
        np.testing.assert_array_equal(found, np.concatenate([e[key] for e in episodes]))
    assert source.prompts(rows) == [e["task"] for e in episodes for _ in e["action"]]
    wrist = np.concatenate([e["images"]["wrist"] for e in episodes])
    np.testing.assert_array_equal(source.images(rows)["wrist"].transpose(0, 2, 3, 1), wrist)
    assert {"q01", "q99"} <= set(source.statistics()["action"])


def test_it_is_what_lerobot_makes_of_the_same_files(v21: Path, tmp_path: Path) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.scripts import convert_dataset_v21_to_v30 as converter

    root = tmp_path / "v30"
    converter.convert_info(v21, root, 100, 200)
    converter.convert_tasks(v21, root)
    data = converter.convert_data(v21, root, 100)
    converter.convert_episodes_metadata(v21, root, data, converter.convert_videos(v21, root, 200))
    ours, converted = LeRobotSource(v21), LeRobotSource(root)
    theirs = LeRobotDataset("somebody/something", root=root, video_backend="pyav")
    rows = np.arange(ours.episode_lengths.sum())
    np.testing.assert_array_equal(ours.states(rows), converted.states(rows))
    assert ours.prompts(rows) == converted.prompts(rows)
    images = ours.images(rows)
    for row in rows:
        frame = theirs[int(row)]
        np.testing.assert_array_equal(ours.actions(rows)[row], frame["action"].numpy())
        np.testing.assert_array_equal(ours.states(rows)[row], frame["observation.state"].numpy())
        assert frame["task"] == ours.prompts(rows)[row]
        for key in (VIDEO, IMAGE):
            found = (frame[key].numpy() * 255).round().astype(np.uint8)
            np.testing.assert_array_equal(images[key.split(".")[-1]][row], found)


def test_version_2_0_has_no_statistics_by_episode(
    tmp_path: Path, spec: RobotSpec, episodes: list[dict[str, Any]]
) -> None:
    root = write_v21(tmp_path / "v20", spec, episodes, "v2.0")
    (root / "meta/episodes_stats.jsonl").unlink()
    (root / "meta/stats.json").write_text("{}")
    source = LeRobotSource(root)
    assert source.provenance["format"] == "lerobot v2.0"
    assert source.episode_lengths.sum() == 20


def test_what_is_wrong_names_the_file(v21: Path) -> None:
    path = v21 / "data/chunk-001/episode_000002.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 7), path)
    with pytest.raises(LibrobotError, match=r"episode_000002.parquet: episode 2: expected 8 frames .* 7"):
        LeRobotSource(v21)
    pq.write_table(table, path)
    video = v21 / f"videos/chunk-000/{VIDEO}/episode_000001.mp4"
    video.unlink()
    with pytest.raises(LibrobotError, match=r"episode_000001.mp4: missing"):
        LeRobotSource(v21)
    lines = (v21 / "meta/episodes.jsonl").read_text().splitlines()
    (v21 / "meta/episodes.jsonl").write_text("\n".join(lines[:3]))
    with pytest.raises(LibrobotError, match=r"episodes.jsonl: expected episodes 0 to 3 in order"):
        LeRobotSource(v21)
