"""What a TFDS folder says of itself: its shards (dataset_info.json) and the fields of a step (features.json).

Both are protobuf messages as JSON (tensorflow_datasets/core/proto/{dataset_info,feature}.proto).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from librobot.errors import LibrobotError

TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
"""TFDS's name of a shard where dataset_info.json has none."""

Kind = Literal["numbers", "encoded", "text", "picture"]

DTYPES = (
    "bool",
    *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)),
    "float16",
    "float32",
    "float64",
)


@dataclass(frozen=True)
class Field:
    """A field of the steps and how records hold it, under `key`. numbers: as a list of float32 or int64;
    encoded: each step's as bytes, compressed (`zlib`) or not. dtype, shape: of a step's numbers or pixels."""

    key: str
    kind: Kind
    dtype: str = ""
    shape: tuple[int, ...] = ()
    zlib: bool = False


@dataclass(frozen=True)
class Described:
    """name: the dataset's; shards with the number of records of each; fields of a step by "a/b" paths, and
    why others cannot be read."""

    name: str
    shards: tuple[tuple[Path, int], ...]
    fields: Mapping[str, Field]
    left_out: Mapping[str, str]


def described(root: Path, split: str) -> Described:
    """Raises LibrobotError for what is no TFDS folder of TFRecords in RLDS's layout, and unknown splits."""
    if not (root / "dataset_info.json").is_file():
        found = sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else []
        raise LibrobotError(
            f"{root}: expected a TFDS folder with dataset_info.json (NAME/VERSION), found "
            f"{', '.join(found) or 'nothing'}"
        )
    info = _json(root / "dataset_info.json")
    found_format = info.get("fileFormat") or "tfrecord"
    if found_format != "tfrecord":
        raise LibrobotError(
            f"{root}: expected files of the format tfrecord, found {found_format}; write them anew (this "
            "needs apache-beam): "
            f"tfds convert_format --dataset_version_dir={root} --out_dir=NEW --out_file_format=tfrecord"
        )
    splits = {each["name"]: each for each in info.get("splits", [])}
    if split not in splits:
        raise LibrobotError(f"{root}: data.source.split: no split {split!r}; it has {', '.join(splits)}")
    top = _Node(_json(root / "features.json")).children()
    if "steps" not in top:
        raise LibrobotError(f"{root}: not RLDS: no feature 'steps'; it has {', '.join(top)}")
    fields: dict[str, Field] = {}
    left_out: dict[str, str] = {}
    for path, field in sorted(_fields(top["steps"].inner(), "")):  # TFDS has no order
        if isinstance(field, str):
            left_out[path] = field
        else:
            fields[path] = field
    lengths = [int(length) for length in splits[split].get("shardLengths", [])]
    template = splits[split].get("filepathTemplate") or TEMPLATE
    shards = tuple(
        (root / _file_name(template, info["name"], split, i, len(lengths)), length)
        for i, length in enumerate(lengths)
    )
    return Described(info["name"], shards, fields, left_out)


def _file_name(template: str, name: str, split: str, index: int, count: int) -> str:
    number, total = f"{index:05d}", f"{count:05d}"
    for variable, value in (
        ("DATASET", name),
        ("SPLIT", split),
        ("FILEFORMAT", "tfrecord"),
        ("SHARD_X_OF_Y", f"{number}-of-{total}"),
        ("SHARD_INDEX", number),
        ("NUM_SHARDS", total),
    ):
        template = template.replace(f"{{{variable}}}", value)
    return template


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LibrobotError(f"{path}: expected TFDS's metadata as JSON: {error}; copy it again") from error
    if not isinstance(value, dict):
        raise LibrobotError(f"{path}: expected a JSON object, found {value!r:.40}; copy it again")
    return value


class _Node:
    """A feature of features.json, as TFDS writes it now, {"pythonClassName": ..., KIND: content}, or did
    before, {"type": ..., "content": ...}."""

    def __init__(self, value: Mapping[str, Any]) -> None:
        name = value.get("pythonClassName") or value.get("type") or ""
        self.name = name.rpartition(".")[2]
        self.content: Any = {}
        if "type" in value:
            content = value.get("content")
            self.content = json.loads(content) if isinstance(content, str) else content or {}
        for kind in ("featuresDict", "sequence", "tensor", "image", "boundingBox"):
            if kind in value:
                self.content = value[kind]
        if "featuresDict" in value:  # it has no name
            self.name = "FeaturesDict"

    def children(self) -> dict[str, _Node]:
        """Of a FeaturesDict, by name."""
        if self.name != "FeaturesDict":
            return {}
        content = self.content.get("features", self.content)
        return {name: _Node(child) for name, child in content.items()}

    def inner(self) -> _Node:
        """Of a Sequence or a Dataset: the feature of one of its elements."""
        return _Node(self.content.get("feature", {}))

    def shape(self) -> tuple[int, ...]:
        """-1 for a dimension that differs."""
        shape = self.content.get("shape") or ()
        dimensions = shape.get("dimensions", ()) if isinstance(shape, Mapping) else shape
        return tuple(-1 if size is None else int(size) for size in dimensions)


def _fields(node: _Node, path: str) -> Iterator[tuple[str, Field | str]]:
    """The fields below `node`, or why one cannot be read."""
    if node.name == "FeaturesDict":
        for name, child in node.children().items():
            yield from _fields(child, f"{path}/{name}" if path else name)
    else:
        yield path, _leaf(node, f"steps/{path}")


def _leaf(node: _Node, key: str) -> Field | str:
    dtype, shape = str(node.content.get("dtype") or ""), node.shape()
    if node.name == "Image":
        shape = shape or (-1, -1, 3)
        if dtype in ("", "uint8") and shape[-1] in (1, 3):
            return Field(key, "picture", "uint8", shape)
        return f"a picture of {dtype} {shape}, neither grey nor of three colours of uint8"
    if node.name == "Text" or dtype in ("string", "object"):
        return "an array of texts" if shape else Field(key, "text")
    if node.name == "ClassLabel":
        return Field(key, "numbers", "int64")
    if node.name not in ("Tensor", "Scalar", "BBoxFeature"):
        return f"a feature of type {node.name or 'unknown'}"
    if dtype not in DTYPES:
        return f"numbers of type {dtype}"
    if -1 in shape:
        return f"a feature of no fixed shape, {shape}"
    encoding = str(node.content.get("encoding") or "none").lower()
    if encoding == "none":
        return Field(key, "numbers", dtype, shape)
    if encoding not in ("bytes", "zlib"):
        return f"a feature of the encoding {encoding}"
    return Field(key, "encoded", dtype, shape, encoding == "zlib")
