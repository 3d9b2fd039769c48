"""Reading the metadata of a LeRobotDataset v3.0 and saying what is wrong with it; v2.x is in metadata_v2."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from librobot.data import format as v3
from librobot.errors import LibrobotError, nearest

STAGING = ".staging"
"""Where our writer keeps complete episodes until `finalize`."""


@dataclass(frozen=True)
class Metadata:
    """What `meta/` says. `episodes` maps a column of the episodes table to one value per episode, in order;
    statistics columns are left out. `librobot` is meta/librobot.json, empty for other tools' datasets."""

    root: Path
    info: dict[str, Any]
    tasks: list[str]
    episodes: dict[str, np.ndarray]
    librobot: dict[str, Any]

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        return self.info["features"]

    @property
    def fps(self) -> float:
        return float(self.info["fps"])

    @property
    def lengths(self) -> np.ndarray:
        return self.episodes["length"]

    def column(self, name: str) -> np.ndarray:
        """A column of the table of episodes."""
        if name not in self.episodes:
            raise LibrobotError(
                f"{self.root / 'meta/episodes'}: no column {name!r}; {nearest(name, self.episodes)}"
            )
        return self.episodes[name]

    def data_files(self) -> list[tuple[Path, np.ndarray]]:
        """Every data file in order, with the episodes that lie in it."""
        template = self.info.get("data_path") or v3.DATA_PATH
        return self._files("data", lambda chunk, file: template.format(chunk_index=chunk, file_index=file))

    def video_files(self, key: str) -> list[tuple[Path, np.ndarray]]:
        """The same for the video feature `key`."""
        template = self.info.get("video_path") or v3.VIDEO_PATH
        return self._files(
            f"videos/{key}",
            lambda chunk, file: template.format(video_key=key, chunk_index=chunk, file_index=file),
        )

    def _files(self, prefix: str, path: Any) -> list[tuple[Path, np.ndarray]]:
        places = np.stack([self.column(f"{prefix}/chunk_index"), self.column(f"{prefix}/file_index")], 1)
        files, which = np.unique(places, axis=0, return_inverse=True)
        which = which.reshape(-1)
        return [
            (self.root / path(int(chunk), int(file)), np.flatnonzero(which == i))
            for i, (chunk, file) in enumerate(files)
        ]


def read_metadata(root: Path) -> Metadata:
    """Read and check `root/meta`. Raises LibrobotError for what is not a complete dataset."""
    info = read_info(root)
    if str(info["codebase_version"]).startswith("v2."):
        from librobot.data.metadata_v2 import read_metadata_v2

        return read_metadata_v2(root, info)
    tasks = read_tasks(root / v3.TASKS)
    episodes = _read_episodes(root, int(info["total_episodes"]))
    librobot_file = root / v3.LIBROBOT
    librobot = _read_json(librobot_file) if librobot_file.exists() else {}
    return Metadata(root, info, tasks, episodes, librobot)


def read_info(root: Path) -> dict[str, Any]:
    """meta/info.json of a dataset whose version is read."""
    path = root / v3.INFO
    if not root.is_dir():
        raise LibrobotError(f"{root}: no such folder; expected a LeRobotDataset {v3.VERSION}")
    if not path.exists():
        raise LibrobotError(_not_a_dataset(root))
    info = _read_json(path)
    version = str(info.get("codebase_version", "unknown"))
    if not version.startswith(("v3.", "v2.")):
        raise LibrobotError(
            f"{root}: this is a LeRobotDataset {version}; v2.0, v2.1 and {v3.VERSION} are read. Convert it "
            "with the lerobot release that wrote it"
        )
    if missing := [key for key in ("fps", "features", "total_episodes", "total_frames") if key not in info]:
        raise LibrobotError(f"{path}: lacks {', '.join(missing)}; the file is incomplete")
    if not info["total_episodes"]:
        raise LibrobotError(f"{root}: holds no episode; record some first")
    return info


def _not_a_dataset(root: Path) -> str:
    staged = list((root / STAGING).glob("episode-*.parquet"))
    if staged:
        return (
            f"{root}: a recording that was interrupted; its {len(staged)} staged episodes are whole. Run the "
            "same librobot-record command again (or LeRobotWriter(..., resume=True).finalize()) to complete "
            "it"
        )
    found = sorted(path.name for path in root.iterdir())[:8]
    return (
        f"{root}: not a LeRobotDataset: {v3.INFO} is missing; found {', '.join(found) or 'an empty folder'}. "
        "Give the folder that holds meta/, data/ and videos/"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LibrobotError(f"{path}: not JSON ({error}); the file is damaged") from error
    if not isinstance(value, dict):
        raise LibrobotError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def open_parquet(path: Path, what: str) -> pq.ParquetFile:
    """Open a parquet file, or say that it is missing or cut short. `what` names its content."""
    if not path.exists():
        raise LibrobotError(f"{path}: missing; expected {what}. Download or copy the dataset again")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise LibrobotError(
            f"{path}: not a whole parquet file ({path.stat().st_size} bytes; {error}); expected {what}. It "
            "was cut short while it was written or copied: copy it again"
        ) from error


def read_tasks(path: Path) -> list[str]:
    """The instructions by task_index. pandas keeps them in an index, which other tools may leave unnamed."""
    table = open_parquet(path, "the table of instructions").read()
    column = next((name for name in ("task", "__index_level_0__") if name in table.column_names), None)
    if column is None or "task_index" not in table.column_names:
        raise LibrobotError(f"{path}: expected columns task and task_index, found {table.column_names}")
    names, indices = table[column].to_pylist(), table["task_index"].to_pylist()
    if sorted(indices) != list(range(len(names))):
        raise LibrobotError(f"{path}: task_index must number the instructions from 0, found {indices[:8]}")
    return [str(name) for _, name in sorted(zip(indices, names, strict=True))]


def _read_episodes(root: Path, total: int) -> dict[str, np.ndarray]:
    folder = root / "meta/episodes"
    files = sorted(folder.glob("*/*.parquet"))
    if not files:
        raise LibrobotError(f"{folder}: no chunk-*/file-*.parquet; expected the table of {total} episodes")
    tables = []
    for path in files:
        file = open_parquet(path, "the table of episodes")
        names = [
            name for name in file.schema_arrow.names if not name.startswith("stats/") and name != "tasks"
        ]
        tables.append(file.read(columns=names))
    table = pa.concat_tables(tables, promote_options="default")
    episodes = {name: as_numpy(table[name]) for name in table.column_names}
    for column in ("episode_index", "length"):
        if column not in episodes:
            raise LibrobotError(f"{folder}: no column {column!r}; {nearest(column, episodes)}")
    if not np.array_equal(episodes["episode_index"], np.arange(total)):
        raise LibrobotError(
            f"{folder}: expected episodes 0 to {total - 1} in order ({v3.INFO}: total_episodes={total}), "
            f"found {len(table)} rows: {episodes['episode_index'][:8]}..."
        )
    return episodes


def as_numpy(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The column's values, to be read. Numbers come without pyarrow's own way, which imports pandas."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    kind = array.type
    if (pa.types.is_integer(kind) or pa.types.is_floating(kind)) and not array.null_count:
        return np.from_dlpack(array)
    return array.to_numpy(zero_copy_only=False)
