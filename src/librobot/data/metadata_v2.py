"""The metadata of a LeRobotDataset v2.1 or v2.0, in which every episode has files of its own.

data/chunk-*/episode_*.parquet                one row per frame
videos/chunk-*/<feature>/episode_*.mp4        from time 0 on
meta/info.json                                chunks_size counts episodes
meta/episodes.jsonl, tasks.jsonl              one JSON object per line
meta/episodes_stats.jsonl (v2.0: stats.json)  not read: they hold no quantiles, ours are computed

The layout is that of lerobot's own converter (lerobot/scripts/convert_dataset_v21_to_v30.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from librobot.data.metadata import Metadata
from librobot.errors import LibrobotError

DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"


class MetadataV2(Metadata):
    """The same questions, answered with one file per episode."""

    def data_files(self) -> list[tuple[Path, np.ndarray]]:
        return self._each(self.info.get("data_path") or DATA_PATH)

    def video_files(self, key: str) -> list[tuple[Path, np.ndarray]]:
        return self._each(self.info.get("video_path") or VIDEO_PATH, video_key=key)

    def _each(self, template: str, **names: str) -> list[tuple[Path, np.ndarray]]:
        chunk = int(self.info.get("chunks_size") or 1000)
        return [
            (self.root / template.format(episode_chunk=i // chunk, episode_index=i, **names), np.array([i]))
            for i in range(len(self.lengths))
        ]


def read_metadata_v2(root: Path, info: dict[str, Any]) -> Metadata:
    """Raises LibrobotError where the tables of episodes and tasks do not say what info.json does."""
    path = root / "meta/episodes.jsonl"
    rows = _read_lines(path, ("episode_index", "length"))
    total = int(info["total_episodes"])
    if [row["episode_index"] for row in rows] != list(range(total)):
        raise LibrobotError(
            f"{path}: expected episodes 0 to {total - 1} in order (meta/info.json: total_episodes={total}), "
            f"found {len(rows)}: {[row['episode_index'] for row in rows[:8]]}; copy meta/ again"
        )
    episodes = {"episode_index": np.arange(total), "length": np.array([int(row["length"]) for row in rows])}
    for key, feature in info["features"].items():
        if feature["dtype"] == "video":
            episodes[f"videos/{key}/from_timestamp"] = np.zeros(total)
    path = root / "meta/tasks.jsonl"
    tasks = sorted(_read_lines(path, ("task_index", "task")), key=lambda row: row["task_index"])
    if [row["task_index"] for row in tasks] != list(range(len(tasks))):
        found = [row["task_index"] for row in tasks[:8]]
        raise LibrobotError(f"{path}: task_index must number the instructions from 0, found {found}")
    return MetadataV2(root, info, [str(row["task"]) for row in tasks], episodes, {})


def _read_lines(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    if not path.exists():
        raise LibrobotError(f"{path}: missing; a LeRobotDataset v2 needs it. Copy the dataset again")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise LibrobotError(f"{path}: line {number}: not JSON ({error}); the file is damaged") from error
        if missing := [key for key in keys if key not in row]:
            raise LibrobotError(f"{path}: line {number}: lacks {', '.join(missing)}, found {sorted(row)}")
        rows.append(row)
    return rows
