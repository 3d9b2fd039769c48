"""LeRobotDataset v3.0 on disk: paths, columns, features and file limits, shared by the reader and the writer.

meta/info.json                      format version, rate, features, totals, path templates
meta/tasks.parquet                  one row per instruction; row order equals task_index
meta/stats.json                     statistics per feature
meta/episodes/chunk-*/file-*.parquet    one row per episode: length, where its data and video lie, statistics
data/chunk-*/file-*.parquet         one row per frame, one row group per episode; images as PNG or JPEG bytes
videos/<feature>/chunk-*/file-*.mp4     several episodes in one file, one stream per camera
meta/librobot.json                  ours: the robot's full spec, the environment and its renderer
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

VERSION = "v3.0"
INFO = "meta/info.json"
STATS = "meta/stats.json"
TASKS = "meta/tasks.parquet"
LIBROBOT = "meta/librobot.json"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
CHUNK_FILES = 1000
"""Files per chunk folder."""
DATA_FILE_BYTES = 100 * 2**20
VIDEO_FILE_BYTES = 200 * 2**20

STATE = "observation.state"
ACTION = "action"
TASK = "task"
IMAGES = "observation.images."

FRAME_FEATURES: dict[str, dict[str, Any]] = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}
"""Columns of every dataset; the timestamp is frame_index / fps, within its episode."""

Feature = Mapping[str, Any]


def is_camera(feature: Feature) -> bool:
    """An image or video feature of colours; depth maps are left out."""
    info = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
    depth = info.get("is_depth_map") or info.get("video.is_depth_map")
    return feature["dtype"] in ("image", "video") and not depth


def camera_name(key: str) -> str:
    """`observation.images.top` -> `top`, `observation.image` -> `image`."""
    return key.removeprefix(IMAGES).removeprefix("observation.")


def image_height_width(feature: Feature) -> tuple[int, int]:
    """The stored size of an image feature, whose shape may be (h, w, c) or (c, h, w)."""
    shape = [int(size) for size in feature["shape"]]
    names = [str(name).lower() for name in feature.get("names") or ()]
    if len(names) == len(shape) and "height" in names and "width" in names:
        return shape[names.index("height")], shape[names.index("width")]
    if shape[0] in (1, 3) and shape[-1] not in (1, 3):
        return shape[1], shape[2]
    return shape[0], shape[1]


def dimension_names(feature: Feature, prefix: str) -> list[str]:
    """One name per dimension of a vector feature.

    Datasets give a list, a dictionary with one list in it, or a dictionary of name to position; anything else
    (or a list of another length) gives `prefix_0`, `prefix_1`, ...
    """
    (size,) = feature["shape"]
    names: Any = feature.get("names")
    if isinstance(names, Mapping) and len(names) == 1 and isinstance(next(iter(names.values())), Sequence):
        names = next(iter(names.values()))
    elif isinstance(names, Mapping) and all(isinstance(position, int) for position in names.values()):
        names = sorted(names, key=names.__getitem__)
    if isinstance(names, Sequence) and len(names) == size and len({str(name) for name in names}) == size:
        return [str(name) for name in names]
    return [f"{prefix}_{i}" for i in range(size)]


def next_file(chunk: int, file: int) -> tuple[int, int]:
    """The (chunk, file) indices after these."""
    return (chunk + 1, 0) if file == CHUNK_FILES - 1 else (chunk, file + 1)


def vector_feature(array: np.ndarray, names: Sequence[str] | None) -> dict[str, Any]:
    """The feature of a per-frame array (frames,) or (frames, dims)."""
    shape = list(array.shape[1:]) or [1]
    dtype = "string" if array.dtype.kind in "UO" else str(array.dtype)
    return {"dtype": dtype, "shape": shape, "names": list(names) if names is not None else None}


def data_schema(features: Mapping[str, Feature]) -> pa.Schema:
    """The arrow schema of a data file, with the metadata by which `datasets` knows images from structs."""
    fields, described = [], {}
    for key, feature in features.items():
        if feature["dtype"] == "video":
            continue
        if feature["dtype"] == "image":
            fields.append(pa.field(key, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
            described[key] = {"_type": "Image"}
            continue
        value: dict[str, Any] = {"dtype": feature["dtype"], "_type": "Value"}
        kind = pa.bool_() if feature["dtype"] == "bool" else pa.type_for_alias(feature["dtype"])
        if list(feature["shape"]) != [1]:
            kind = pa.list_(kind, int(feature["shape"][0]))
            value = {"feature": value, "length": int(feature["shape"][0]), "_type": "List"}
        fields.append(pa.field(key, kind))
        described[key] = value
    metadata = {"huggingface": json.dumps({"info": {"features": described}})}
    return pa.schema(fields, metadata=metadata)


def is_feature_name(key: str) -> bool:
    """Whether `key` can be a column and a folder name."""
    return re.fullmatch(r"[A-Za-z0-9_\-. ]+", key) is not None
