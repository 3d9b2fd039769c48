"""Episodes of LeRobotDatasets put into a new one as they are: no picture is encoded a second time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from librobot.data import format as v3
from librobot.data.consolidate import STATISTICS, consolidate
from librobot.data.files import remove_temporaries, written_whole
from librobot.data.local_cache import LocalCache
from librobot.data.metadata import STAGING, Metadata, open_parquet
from librobot.data.sources.lerobot import LeRobotSource
from librobot.data.staging import EPISODE_KEY, StagedEpisode, staged_episodes
from librobot.data.statistics import image_statistics, sample_frames, vector_statistics
from librobot.data.video import copy_span, encode_video
from librobot.errors import LibrobotError
from librobot.progress import ProgressBar

Chosen = Sequence[tuple[LeRobotSource, int]]
"""Episodes, by dataset and number."""


def copy_episodes(root: Path, chosen: Chosen, *, show: bool = True) -> int:
    """Write a LeRobotDataset v3.0 of the `chosen` episodes to `root`, and go on with what is there.

    All columns are kept, timestamps too; pictures in tables and packets of videos are copied. Where an
    episode does not begin with a keyframe, or its video has frames out of order, its frames are encoded
    anew; returned is the number of such videos.

    Raises LibrobotError for datasets whose features, rates or robots differ.
    """
    sources = list({id(source): source for source, _ in chosen}.values())
    features, description = _common(sources)
    fps = sources[0].metadata.fps
    if fps != int(fps):
        raise LibrobotError(f"{sources[0].root}: expected a rate that is a whole number, found {fps:g}")
    for folder in ("meta", "data", "videos"):
        remove_temporaries(root / folder)
    if not (root / v3.INFO).exists():
        copiers = {id(source): EpisodeCopier(source, features) for source in sources}
        staged = staged_episodes(root)
        rows = sum(episode.record["length"] for episode in staged)
        with ProgressBar(f"copying {root.name.removesuffix('.partial')}", len(chosen), show=show) as progress:
            progress.advance(len(staged))
            for source, episode in chosen[len(staged) :]:
                staged.append(copiers[id(source)].stage(episode, root, len(staged), rows))
                rows += staged[-1].record["length"]
                progress.advance(1)
        robot = sources[0].spec.name
        consolidate(root, staged, features, fps=int(fps), robot_type=robot, description=description)
    encoded = sum(episode.record.get("encoded", 0) for episode in staged_episodes(root))
    shutil.rmtree(root / STAGING, ignore_errors=True)
    return encoded


def _common(sources: Sequence[LeRobotSource]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The features and meta/librobot.json of all `sources`, which must agree."""
    first = sources[0]
    expected = _compared(first.metadata)
    for source in sources[1:]:
        found = _compared(source.metadata)
        for key in sorted({*expected, *found}):
            if expected.get(key) != found.get(key):
                raise LibrobotError(
                    f"{source.root}: {key}: expected {expected.get(key)} as in {first.root}, found "
                    f"{found.get(key)}; what is copied must agree. Give --rewrite to "
                    "write only the cameras, states, actions and instructions"
                )
    described = [source.metadata.librobot for source in sources]
    same = {key: value for key, value in described[0].items() if all(d.get(key) == value for d in described)}
    specs = [d["spec"] for d in described if "spec" in d]
    if specs:
        same["spec"] = specs[0]
    features = {key: dict(feature) for key, feature in first.metadata.features.items()}
    for key, feature in features.items():
        if feature["dtype"] not in ("image", "video") and len(feature["shape"]) != 1:
            raise LibrobotError(
                f"{first.root}: {key}: expected a value or a vector of each frame, found shape "
                f"{feature['shape']}; give --rewrite to write only cameras, states, actions and instructions"
            )
    return features | {key: f for key, f in v3.FRAME_FEATURES.items() if key not in features}, same


def _compared(metadata: Metadata) -> dict[str, Any]:
    """What two datasets must have in common."""
    compared: dict[str, Any] = {"fps": metadata.fps}
    for key, feature in metadata.features.items():
        if key not in v3.FRAME_FEATURES:
            compared[key] = {"dtype": feature["dtype"], "shape": list(feature["shape"])}
            compared[key]["names"] = feature.get("names")
    for kind in ("state", "action"):
        if dims := metadata.librobot.get("spec", {}).get(kind):
            compared[f"{kind} of the robot's spec"] = dims
    return compared


class EpisodeCopier:
    """Stages episodes of one dataset, as columns `features` of another."""

    def __init__(self, source: LeRobotSource, features: Mapping[str, v3.Feature]) -> None:
        self.source, self.metadata, self.features = source, source.metadata, features
        lengths = self.metadata.lengths
        self.begins = np.cumsum(lengths) - lengths
        self.places: dict[int, tuple[Path, int]] = {}  # episode -> its file and first row there
        for path, episodes in self.metadata.data_files():
            starts = np.cumsum(lengths[episodes]) - lengths[episodes]
            self.places |= {int(e): (path, int(row)) for e, row in zip(episodes, starts, strict=True)}
        self.videos = {
            key: {int(e): path for path, episodes in self.metadata.video_files(key) for e in episodes}
            for key, feature in features.items()
            if feature["dtype"] == "video"
        }
        self.statistics = _StoredStatistics(self.metadata)
        self._open = LocalCache(pq.ParquetFile, capacity=1)

    def stage(self, episode: int, root: Path, index: int, first_row: int) -> StagedEpisode:
        """Episode `episode` of the source as episode `index` of `root`, from row `first_row` on."""
        table, length = self._table(episode), int(self.metadata.lengths[episode])
        path = root / STAGING / f"episode-{index:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        tasks = self.source.prompts(self.begins[episode] + np.arange(length))
        different = list(dict.fromkeys(tasks))
        counters = {
            "frame_index": np.arange(length),
            "episode_index": np.full(length, index),
            "index": first_row + np.arange(length),
            "task_index": np.array([different.index(task) for task in tasks]),
        }
        columns, stats, encoded = {}, {}, 0
        staged = StagedEpisode(index, path, {})
        for key, feature in self.features.items():
            if feature["dtype"] == "video":
                encoded += self._video(key, episode, staged.video(key))
            else:
                columns[key] = pa.array(counters[key]) if key in counters else table[key].combine_chunks()
                if feature["dtype"] == "image":
                    columns[key] = self._with_bytes(columns[key])
            found = self._statistics(key, episode, columns.get(key), length)
            if found is not None:
                stats[key] = {name: np.asarray(value).tolist() for name, value in found.items()}
        record = {"tasks": different, "length": length, "stats": stats, "encoded": encoded}
        staged_table = pa.table(columns).replace_schema_metadata({EPISODE_KEY: json.dumps(record)})
        with written_whole(path) as temporary:
            pq.write_table(staged_table, temporary, compression="none", use_dictionary=False)
        return StagedEpisode(index, path, record)

    def _table(self, episode: int) -> pa.Table:
        path, start = self.places[episode]
        wanted = [key for key, feature in self.features.items() if feature["dtype"] != "video"]
        file = self._open(path) if path.exists() else open_parquet(path, f"the frames of episode {episode}")
        rows = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        ends = np.cumsum(rows)
        length = int(self.metadata.lengths[episode])
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, start + length - 1, side="right"))
        try:
            table = file.read_row_groups(list(range(first, last + 1)), columns=wanted)
        except (pa.ArrowException, OSError) as error:
            raise LibrobotError(
                f"{path}: damaged ({error}); expected the frames of episode {episode}. Copy the file again"
            ) from error
        return table.slice(start - (int(ends[first]) - rows[first]), length)

    def _with_bytes(self, images: pa.Array) -> pa.Array:
        """v2 datasets may keep the picture in a file of its own, and its path here."""
        values = images.to_pylist()
        if all(value["bytes"] for value in values):
            return images
        read = []
        for value in values:
            path = self.source.root / (value["path"] or "?")
            if not value["bytes"] and not path.is_file():
                raise LibrobotError(f"{path}: missing; expected a picture. Download the dataset again")
            read.append(value["bytes"] or path.read_bytes())
        return pa.array([{"bytes": data, "path": None} for data in read], images.type)

    def _video(self, key: str, episode: int, target: Path) -> bool:
        """Copy the packets of the episode; whether its frames had to be encoded anew."""
        path = self.videos[key][episode]
        begin = float(self.metadata.column(f"videos/{key}/from_timestamp")[episode])
        length, fps = int(self.metadata.lengths[episode]), self.metadata.fps
        with written_whole(target) as temporary:
            if copy_span(path, temporary, begin, length, fps):
                return False
            encode_video(temporary, self._frames(key, episode, np.arange(length)), int(fps))
        return True

    def _frames(self, key: str, episode: int, frames: np.ndarray) -> np.ndarray:
        camera = v3.camera_name(key)
        if not v3.is_camera(self.features[key]):
            raise LibrobotError(
                f"{self.videos[key][episode]}: episode {episode}: {key}: its packets cannot be copied, "
                "and it is no camera of colours, which could be encoded anew"
            )
        images = self.source.images(self.begins[episode] + frames)[camera]
        return np.ascontiguousarray(images.transpose(0, 2, 3, 1))

    def _statistics(self, key: str, episode: int, column: Any, length: int) -> Mapping[str, Any] | None:
        feature = self.features[key]
        if feature["dtype"] in ("image", "video"):
            if (stored := self.statistics.of(key, episode)) is not None:
                return stored
            if not v3.is_camera(feature):
                return None
            return image_statistics(self._frames(key, episode, sample_frames(length)))
        if feature["dtype"] == "string" or key == "task_index":
            return None
        flat = column.flatten() if pa.types.is_nested(column.type) else column
        values = flat.to_numpy(zero_copy_only=False).reshape(length, -1).astype(np.float64)
        return vector_statistics(values) | {"count": np.array([length])}


class _StoredStatistics:
    """What the table of episodes says of each picture feature, where it says all."""

    def __init__(self, metadata: Metadata) -> None:
        files = sorted((metadata.root / "meta/episodes").glob("*/*.parquet"))
        self.rows: dict[int, dict[str, Any]] = {}
        for path in files:
            names = [
                name
                for name in open_parquet(path, "the table of episodes").schema_arrow.names
                if name == "episode_index" or name.startswith("stats/")
            ]
            for row in pq.read_table(path, columns=names).to_pylist():
                self.rows[row["episode_index"]] = row

    def of(self, key: str, episode: int) -> dict[str, Any] | None:
        row = self.rows.get(episode, {})
        found = {name: row.get(f"stats/{key}/{name}") for name in STATISTICS}
        return None if any(value is None for value in found.values()) else found
