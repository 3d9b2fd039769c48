"""RLDS folders as TFDS writes them, without tensorflow: for tests that must be quick."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from librobot.data.sources.tfrecords import masked_checksum


def varint(value: int) -> bytes:
    value %= 1 << 64
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(values: Any) -> bytes:
    """A tf.train.Feature of floats, integers or bytes."""
    if isinstance(values, list):
        return message(1, b"".join(message(1, value) for value in values))
    if values.dtype.kind == "f":
        return message(2, message(1, values.astype("<f4").tobytes()))
    return message(3, message(1, b"".join(varint(int(value)) for value in values.reshape(-1))))


def example(features: Mapping[str, Any]) -> bytes:
    entries = (message(1, name.encode()) + message(2, feature(values)) for name, values in features.items())
    return message(1, b"".join(message(1, entry) for entry in entries))


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return b"".join(
        (length, struct.pack("<I", masked_checksum(length)), data, struct.pack("<I", masked_checksum(data)))
    )


CLASSES = "tensorflow_datasets.core.features"


def tensor(shape: Sequence[int], dtype: str = "float32", **more: Any) -> dict[str, Any]:
    content = {"shape": {"dimensions": [str(size) for size in shape]}, "dtype": dtype, "encoding": "none"}
    return {"pythonClassName": f"{CLASSES}.tensor_feature.Tensor", "tensor": content | more}


def write_folder(root: Path, steps: Mapping[str, Any], shards: Sequence[Sequence[Mapping[str, Any]]]) -> Path:
    """steps: features.json's of a step; shards: of each the Examples, by "steps/..." names."""
    root.mkdir(parents=True)
    for number, episodes in enumerate(shards):
        name = f"robot-train.tfrecord-{number:05d}-of-{len(shards):05d}"
        (root / name).write_bytes(b"".join(record(example(episode)) for episode in episodes))
    inner = {"featuresDict": {"features": steps}}
    dataset = {"pythonClassName": f"{CLASSES}.dataset_feature.Dataset", "sequence": {"feature": inner}}
    (root / "features.json").write_text(json.dumps({"featuresDict": {"features": {"steps": dataset}}}))
    lengths = [str(len(episodes)) for episodes in shards]
    split = {
        "name": "train",
        "shardLengths": lengths,
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    (root / "dataset_info.json").write_text(
        json.dumps({"name": "robot", "fileFormat": "tfrecord", "splits": [split]})
    )
    return root


STEPS = {
    "action": tensor((3,)),
    "count": tensor((), "int64"),
    "language_instruction": {"pythonClassName": f"{CLASSES}.text_feature.Text", "text": {}},
    "observation": {
        "featuresDict": {
            "features": {
                "image": {
                    "pythonClassName": f"{CLASSES}.image_feature.Image",
                    "image": {"shape": {"dimensions": ["4", "6", "3"]}, "dtype": "uint8"},
                },
                "points": {
                    "pythonClassName": f"{CLASSES}.sequence_feature.Sequence",
                    "sequence": {"feature": tensor((2,)), "length": "-1"},
                },
            }
        }
    },
}


def episode(actions: np.ndarray, frames: Sequence[bytes], texts: Sequence[str]) -> dict[str, Any]:
    return {
        "steps/action": actions,
        "steps/count": np.arange(len(actions)) * 100 - 7,
        "steps/language_instruction": [text.encode() for text in texts],
        "steps/observation/image": list(frames),
    }
