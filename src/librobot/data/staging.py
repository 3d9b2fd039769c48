"""Complete episodes on disk before they are put together: one parquet file each, plus one mp4 per video
camera.

The parquet file is renamed into place last, so its presence means that the episode is whole. What is staged
survives the death of the process (SIGKILL); nothing is synced for a loss of power.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from librobot.data import format as v3
from librobot.data.files import remove_temporaries, written_whole
from librobot.data.images import encode_png
from librobot.data.metadata import STAGING
from librobot.data.statistics import image_statistics, vector_statistics
from librobot.data.video import encode_video

EPISODE_KEY = b"librobot_episode"
"""Schema metadata of a staged file: the episode's row in the table of episodes, as JSON."""


@dataclass(frozen=True)
class StagedEpisode:
    """A whole episode in the staging folder. `record` is {"tasks", "length", "stats": {feature: {name:
    list}}}; its column task_index numbers its own tasks."""

    index: int
    path: Path
    record: dict[str, Any]

    def video(self, key: str) -> Path:
        return self.path.with_name(f"{self.path.stem}.{key}.mp4")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        for video in self.path.parent.glob(f"{self.path.stem}.*.mp4"):
            video.unlink(missing_ok=True)


def stage_episode(
    root: Path,
    index: int,
    first_row: int,
    features: Mapping[str, v3.Feature],
    arrays: Mapping[str, np.ndarray],
    tasks: Sequence[str],
    fps: int,
) -> StagedEpisode:
    """Write episode `index`, whose first frame is row `first_row` of the dataset.

    tasks: the instruction of each of the `length` frames. arrays: one array for each feature, images
    (length, h, w, 3), vectors (length, dims) or (length,).
    """
    path = root / STAGING / f"episode-{index:06d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    length = len(tasks)
    different = list(dict.fromkeys(tasks))
    frames = np.arange(length)
    counters = {
        "timestamp": (frames / fps).astype(np.float32),
        "frame_index": frames,
        "episode_index": np.full(length, index),
        "index": first_row + frames,
        "task_index": np.array([different.index(task) for task in tasks]),
    }
    stats = {}
    columns: dict[str, pa.Array] = {}
    staged = StagedEpisode(index, path, {})
    for key, feature in features.items():
        values = counters[key] if key in counters else arrays[key]
        if feature["dtype"] in ("image", "video"):
            stats[key] = image_statistics(values)
        elif feature["dtype"] != "string" and key != "task_index":
            vectors = values.reshape(length, -1).astype(np.float64)
            stats[key] = vector_statistics(vectors) | {"count": np.array([length])}
        if feature["dtype"] == "video":
            with written_whole(staged.video(key)) as temporary:
                encode_video(temporary, values, fps)
        elif feature["dtype"] == "image":
            columns[key] = pa.array(
                [{"bytes": encode_png(image), "path": None} for image in values],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            )
        elif values.ndim == 2 and list(feature["shape"]) != [1]:
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            columns[key] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        else:
            columns[key] = pa.array(values.reshape(length))
    plain = {key: {name: value.tolist() for name, value in part.items()} for key, part in stats.items()}
    record = {"tasks": different, "length": length, "stats": plain}
    table = pa.table(columns).replace_schema_metadata({EPISODE_KEY: json.dumps(record)})
    with written_whole(path) as temporary:
        # PNG bytes do not compress a second time; the final file is written with snappy.
        pq.write_table(table, temporary, compression="none", use_dictionary=False)
    return StagedEpisode(index, path, record)


def staged_episodes(root: Path) -> list[StagedEpisode]:
    """The whole episodes in the staging folder, in order; what an interrupted write left is removed."""
    folder = root / STAGING
    if not folder.is_dir():
        return []
    remove_temporaries(folder)
    episodes = []
    for path in sorted(folder.glob("episode-*.parquet")):
        record = json.loads(pq.read_schema(path).metadata[EPISODE_KEY])
        episodes.append(StagedEpisode(int(path.stem.removeprefix("episode-")), path, record))
    whole = {episode.path.stem for episode in episodes}
    for video in folder.glob("episode-*.mp4"):
        if video.name.split(".")[0] not in whole:
            video.unlink()
    return episodes
