"""Putting staged episodes together into the files of a LeRobotDataset v3.0, so that it can be interrupted.

While files change, meta/info.json lies aside: without it neither librobot nor lerobot takes the folder for a
dataset. It is renamed back last. Running again after a kill starts from the last complete state, which
info.json (or the one laid aside) counts: everything written beyond its totals is written anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from librobot.data import format as v3
from librobot.data.files import write_json, written_whole
from librobot.data.metadata import STAGING, read_tasks
from librobot.data.staging import StagedEpisode
from librobot.data.statistics import QUANTILES, merge_statistics, vector_statistics
from librobot.data.video import join_videos, stream_format, video_info

STATISTICS = ("min", "max", "mean", "std", "count", *QUANTILES)
INFO_ASIDE = f"{STAGING}/info.json"

Row = dict[str, Any]


def read_complete_info(root: Path) -> dict[str, Any] | None:
    """info.json of the last complete state, None for a new dataset."""
    for path in (root / v3.INFO, root / INFO_ASIDE):
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
    return None


def consolidate(
    root: Path,
    staged: Sequence[StagedEpisode],
    features: Mapping[str, v3.Feature],
    *,
    fps: int,
    robot_type: str,
    description: Mapping[str, Any],
    data_file_bytes: int = v3.DATA_FILE_BYTES,
    video_file_bytes: int = v3.VIDEO_FILE_BYTES,
) -> None:
    """Append `staged` (consecutive episodes) to the dataset at `root`. `description` is
    meta/librobot.json."""
    info = read_complete_info(root)
    if (root / v3.INFO).exists():
        (root / STAGING).mkdir(exist_ok=True)
        os.replace(root / v3.INFO, root / INFO_ASIDE)
    rows = _complete_rows(root, info)
    tasks = _complete_tasks(root, info)
    for episode in staged:
        tasks += [task for task in episode.record["tasks"] if task not in tasks]

    numbers = [_task_numbers(episode, tasks) for episode in staged]
    new = [_episode_row(episode, number) for episode, number in zip(staged, numbers, strict=True)]
    start = int(rows[-1]["dataset_to_index"]) if rows else 0
    for row in new:
        row["dataset_from_index"], row["dataset_to_index"] = start, start + row["length"]
        start += row["length"]
    described = {key: dict(feature) for key, feature in features.items()}
    _write_data(root, staged, new, rows, features, numbers, data_file_bytes)
    for key, feature in described.items():
        if feature["dtype"] == "video":
            first = _write_videos(root, key, staged, new, rows, fps, video_file_bytes)
            complete = (info or {"features": {key: {}}})["features"][key].get("info")
            feature["info"] = complete or feature.get("info") or video_info(first, fps)

    rows += new
    _write_episodes(root, rows)
    _write_tasks(root, tasks)
    stats = {}
    for key in _described_features(rows):
        parts = [{name: np.asarray(row[f"stats/{key}/{name}"]) for name in STATISTICS} for row in rows]
        stats[key] = {name: value.tolist() for name, value in merge_statistics(parts).items()}
    write_json(root / v3.STATS, stats)
    write_json(root / v3.LIBROBOT, dict(description))
    write_json(
        root / v3.INFO,
        {
            "codebase_version": v3.VERSION,
            "robot_type": robot_type,
            "total_episodes": len(rows),
            "total_frames": start,
            "total_tasks": len(tasks),
            "chunks_size": v3.CHUNK_FILES,
            "data_files_size_in_mb": v3.DATA_FILE_BYTES // 2**20,
            "video_files_size_in_mb": v3.VIDEO_FILE_BYTES // 2**20,
            "fps": fps,
            "splits": {"train": f"0:{len(rows)}"},
            "data_path": v3.DATA_PATH,
            "video_path": v3.VIDEO_PATH if any(f["dtype"] == "video" for f in described.values()) else None,
            "features": described,
        },
    )


def _described_features(rows: Sequence[Row]) -> list[str]:
    """The features of which every episode has statistics."""
    found = [name for name in rows[0] if name.startswith("stats/") and name.endswith("/mean")]
    return [name.split("/")[1] for name in found if all(row.get(name) is not None for row in rows)]


def _complete_rows(root: Path, info: Mapping[str, Any] | None) -> list[Row]:
    if info is None:
        return []
    tables = [pq.read_table(path) for path in sorted((root / "meta/episodes").glob("*/*.parquet"))]
    return pa.concat_tables(tables, promote_options="default").to_pylist()[: info["total_episodes"]]


def _complete_tasks(root: Path, info: Mapping[str, Any] | None) -> list[str]:
    if info is None:
        return []
    return read_tasks(root / v3.TASKS)[: info["total_tasks"]]


def _task_numbers(episode: StagedEpisode, tasks: Sequence[str]) -> np.ndarray:
    """The dataset's number of each frame's instruction, (T,)."""
    own = pq.read_table(episode.path, columns=["task_index"])["task_index"].to_numpy()
    return np.array([tasks.index(task) for task in episode.record["tasks"]])[own]


def _episode_row(episode: StagedEpisode, task_numbers: np.ndarray) -> Row:
    record = episode.record
    numbers = vector_statistics(task_numbers[:, None]) | {"count": np.array([record["length"]])}
    task_index = {name: value.tolist() for name, value in numbers.items()}
    stats = {
        f"stats/{key}/{name}": value
        for key, part in {**record["stats"], "task_index": task_index}.items()
        for name, value in part.items()
    }
    return {
        "episode_index": episode.index,
        "tasks": record["tasks"],
        "length": record["length"],
        **stats,
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
    }


def _grouped(
    staged: Sequence[StagedEpisode],
    sizes: Sequence[int],
    rows: Sequence[Row],
    prefix: str,
    limit: int,
    kinds: Sequence[Any] = (),
) -> Iterator[tuple[int, int, list[int]]]:
    """(chunk, file, positions in `staged`) of every new file: filled up to `limit` bytes, after the last old
    one. kinds: episodes of one file have the same."""
    place = (0, 0)
    if rows:
        place = v3.next_file(rows[-1][f"{prefix}/chunk_index"], rows[-1][f"{prefix}/file_index"])
    group: list[int] = []
    size = 0
    for i in range(len(staged)):
        if group and (size + sizes[i] > limit or (kinds and kinds[i] != kinds[group[-1]])):
            yield *place, group
            place, group, size = v3.next_file(*place), [], 0
        group.append(i)
        size += sizes[i]
    if group:
        yield *place, group


def _write_data(
    root: Path,
    staged: Sequence[StagedEpisode],
    new: Sequence[Row],
    rows: Sequence[Row],
    features: Mapping[str, v3.Feature],
    task_numbers: Sequence[np.ndarray],
    limit: int,
) -> None:
    schema = v3.data_schema(features)
    dictionary = [key for key, feature in features.items() if feature["dtype"] not in ("image", "video")]
    sizes = [episode.path.stat().st_size for episode in staged]
    for chunk, file, group in _grouped(staged, sizes, rows, "data", limit):
        with (
            written_whole(root / v3.DATA_PATH.format(chunk_index=chunk, file_index=file)) as temporary,
            pq.ParquetWriter(temporary, schema, compression="snappy", use_dictionary=dictionary) as writer,
        ):
            for i in group:
                table = pq.read_table(staged[i].path)
                place = table.schema.get_field_index("task_index")
                table = table.set_column(place, "task_index", pa.array(task_numbers[i]))
                table = table.replace_schema_metadata()
                writer.write_table(table.select(schema.names).cast(schema), row_group_size=len(table))
                new[i]["data/chunk_index"], new[i]["data/file_index"] = chunk, file


def _write_videos(
    root: Path,
    key: str,
    staged: Sequence[StagedEpisode],
    new: Sequence[Row],
    rows: Sequence[Row],
    fps: int,
    limit: int,
) -> Path:
    """Join the staged videos of one camera; the first file written."""
    sizes = [episode.video(key).stat().st_size for episode in staged]
    kinds = [stream_format(episode.video(key)) for episode in staged]
    first = None
    for chunk, file, group in _grouped(staged, sizes, rows, f"videos/{key}", limit, kinds):
        path = root / v3.VIDEO_PATH.format(video_key=key, chunk_index=chunk, file_index=file)
        first = first or path
        with written_whole(path) as temporary:
            join_videos(temporary, [staged[i].video(key) for i in group], fps)
        frames = 0
        for i in group:
            new[i][f"videos/{key}/chunk_index"], new[i][f"videos/{key}/file_index"] = chunk, file
            new[i][f"videos/{key}/from_timestamp"] = frames / fps
            frames += new[i]["length"]
            new[i][f"videos/{key}/to_timestamp"] = frames / fps
    assert first is not None
    return first


def _write_episodes(root: Path, rows: Sequence[Row]) -> None:
    """The whole table in one file: about 10 kB an episode, so 10 000 episodes fill the format's 100 MB."""
    for row in rows:
        row["meta/episodes/chunk_index"] = row["meta/episodes/file_index"] = 0
    path = root / v3.EPISODES_PATH.format(chunk_index=0, file_index=0)
    with written_whole(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows)), temporary, compression="snappy")
    for other in (root / "meta/episodes").glob("*/*.parquet"):
        if other != path:
            other.unlink()


def _write_tasks(root: Path, tasks: Sequence[str]) -> None:
    """With pandas' index metadata, by which other readers find the instruction as the row's label."""
    import pandas as pd

    frame = pd.DataFrame({"task_index": range(len(tasks))}, index=pd.Index(list(tasks), name="task"))
    with written_whole(root / v3.TASKS) as temporary:
        frame.to_parquet(temporary)
