"""Staged episodes become a TFDS folder in RLDS's layout; a program, because it imports tensorflow.

    python -m librobot.data.rlds_build FOLDER shard     the staged episodes become the next shard
    python -m librobot.data.rlds_build FOLDER finish    the shards get their names and TFDS's metadata

What lies in FOLDER before is in `librobot.data.rlds_writer`. After "finish" TFDS reads it:
`tfds.builder_from_directory(FOLDER).as_dataset(split="train")`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

STAGING = ".staging"


def features(described: dict[str, Any]) -> Any:
    """The features of an episode, of {"state_dim", "action_dim", "cameras": {name: [height, width]},
    "encoding": "png" or "jpeg"}."""
    import tensorflow_datasets as tfds

    observation: dict[str, Any] = {
        camera: tfds.features.Image(shape=(*size, 3), dtype=np.uint8, encoding_format=described["encoding"])
        for camera, size in described["cameras"].items()
    }
    if described["state_dim"]:
        observation["state"] = tfds.features.Tensor(shape=(described["state_dim"],), dtype=np.float32)
    step: dict[str, Any] = {
        "action": tfds.features.Tensor(shape=(described["action_dim"],), dtype=np.float32),
        "is_first": np.bool_,
        "is_last": np.bool_,
        "is_terminal": np.bool_,
        "language_instruction": tfds.features.Text(),
    }
    if observation:
        step["observation"] = observation
    return tfds.features.FeaturesDict({"steps": tfds.features.Dataset(step)})


def steps(path: Path) -> Iterator[dict[str, Any]]:
    """The steps of a staged episode."""
    with np.load(path, allow_pickle=False) as episode:
        arrays = {name: episode[name] for name in episode.files}
    tasks = json.loads(bytes(arrays["tasks"]))
    length = len(arrays["action"])
    cameras = [name.removeprefix("ends/") for name in arrays if name.startswith("ends/")]
    for i in range(length):
        observation: dict[str, Any] = {}
        for camera in cameras:
            ends = arrays[f"ends/{camera}"]
            begin = int(ends[i - 1]) if i else 0
            observation[camera] = arrays[f"blob/{camera}"][begin : int(ends[i])].tobytes()
        if arrays["state"].shape[1]:
            observation["state"] = arrays["state"][i]
        step = {
            "action": arrays["action"][i],
            "is_first": i == 0,
            "is_last": i == length - 1,
            "is_terminal": i == length - 1,
            "language_instruction": tasks[i],
        }
        yield step | ({"observation": observation} if observation else {})


def write_shard(folder: Path) -> None:
    """The staged episodes, in order, as shard-XXXXX.tfrecord."""
    import tensorflow as tf

    described = json.loads((folder / STAGING / "dataset.json").read_text(encoding="utf-8"))
    feature = features(described)
    target = folder / f"shard-{len(described['shards']):05d}.tfrecord"
    temporary = target.with_suffix(f".tmp-{os.getpid()}")
    with tf.io.TFRecordWriter(str(temporary)) as writer:
        for path in sorted((folder / STAGING).glob("episode-*.npz")):
            writer.write(feature.serialize_example(feature.encode_example({"steps": list(steps(path))})))
    os.replace(temporary, target)


def finish(folder: Path) -> None:
    """Give the shards the names that TFDS looks for, and write features.json and dataset_info.json."""
    import tensorflow_datasets as tfds

    described = json.loads((folder / STAGING / "dataset.json").read_text(encoding="utf-8"))
    lengths = [shard["episodes"] for shard in described["shards"]]
    for i in range(len(lengths)):
        shard = folder / f"shard-{i:05d}.tfrecord"
        if shard.exists():  # else renamed, before an interruption
            shard.rename(folder / f"{described['name']}-train.tfrecord-{i:05d}-of-{len(lengths):05d}")
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=described["name"], split="train", filetype_suffix="tfrecord"
    )
    train = tfds.core.SplitInfo(
        name="train",
        shard_lengths=lengths,
        num_bytes=sum(path.stat().st_size for path in folder.glob("*.tfrecord-*")),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=str(folder),
        features=features(described),
        split_infos=[train],
        description=f"{described['name']}: {sum(lengths)} episodes, converted by librobot.",
    )


if __name__ == "__main__":
    try:
        (write_shard if sys.argv[2] == "shard" else finish)(Path(sys.argv[1]))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
