"""The only program of librobot that imports tensorflow: a TFDS folder becomes plain files, once.

    python -m librobot.data.rlds_export FOLDER SPLIT OUT

Every step of every episode in the dataset's order, without shuffling; pictures stay encoded as they are.
OUT gets content.json ({"lengths", "fields": {path: {"file", "kind", ...}}, "left_out": {path: why}}) and for
each field

    numbers   FILE.bin                   raw values, (steps, *shape)
    text      FILE.bin and its table     int32 index into "texts"
    picture   FILE.blob, FILE.bin        encoded bytes, int64 ends

Progress goes to stdout as "DONE TOTAL" lines of episodes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


class Field:
    """One field of the steps, written as it comes."""

    def __init__(self, folder: Path, number: int, kind: str) -> None:
        self.name, self.kind = f"field_{number:03d}", kind
        self.values: BinaryIO = (folder / f"{self.name}.bin").open("wb")
        self.blob: BinaryIO | None = (folder / f"{self.name}.blob").open("wb") if kind == "picture" else None
        self.end, self.texts = 0, {}  # type: int, dict[str, int]
        self.dtype, self.shape = "", ()  # type: str, tuple[int, ...]

    def add(self, values: np.ndarray) -> None:
        if self.kind == "numbers":
            if not self.dtype:
                self.dtype, self.shape = str(values.dtype), values.shape[1:]
            if values.shape[1:] != self.shape:
                raise ValueError(f"expected shape {self.shape}, found {values.shape[1:]}")
            np.ascontiguousarray(values).tofile(self.values)
        elif self.kind == "text":
            decoded = [value.decode("utf-8", "replace") for value in values]
            index = [self.texts.setdefault(text, len(self.texts)) for text in decoded]
            np.array(index, np.int32).tofile(self.values)
        else:
            assert self.blob is not None
            for value in values:
                self.blob.write(value)
            ends = self.end + np.cumsum([len(value) for value in values], dtype=np.int64)
            self.end = int(ends[-1])
            ends.tofile(self.values)

    def close(self) -> dict[str, Any]:
        self.values.close()
        if self.blob is not None:
            self.blob.close()
        described: dict[str, Any] = {"file": self.name, "kind": self.kind}
        if self.kind == "numbers":
            described |= {"dtype": self.dtype, "shape": list(self.shape)}
        if self.kind == "text":
            described["texts"] = list(self.texts)
        return described


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries by "a/b" paths."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}/{key}" if prefix else str(key))
    else:
        yield prefix, tree


def kind_of(feature: Any) -> str:
    """numbers, text or picture, "encoded" for numbers in compressed bytes, else why it is left out."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Image):
        return "picture"
    if isinstance(feature, tfds.features.Text):
        return "text"
    dtype = tf.as_dtype(feature.np_dtype if hasattr(feature, "np_dtype") else feature.dtype)
    if dtype == tf.string:
        return "text" if feature.shape == () else "an array of texts"
    if isinstance(feature, tfds.features.Tensor):
        if None in feature.shape:
            return f"a feature of no fixed shape, {feature.shape}"
        stored = tf.as_dtype(feature.get_serialized_info().np_dtype)
        return "encoded" if stored == tf.string else "numbers"
    return f"a feature of type {type(feature).__name__}"


def export(folder: str, split: str, out: Path) -> None:
    """Raises ValueError for a folder without steps."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    if split not in builder.info.splits:
        raise ValueError(f"no split {split!r}; it has {', '.join(builder.info.splits)}")
    if "steps" not in builder.info.features:
        raise ValueError(f"not RLDS: no feature 'steps'; it has {', '.join(builder.info.features)}")
    features = dict(sorted(flatten_features(builder.info.features["steps"].feature)))  # TFDS has no order
    kinds = {path: kind_of(feature) for path, feature in features.items()}
    left_out = {p: kind for p, kind in kinds.items() if kind not in ("numbers", "text", "picture", "encoded")}
    fields: dict[str, Field] = {}
    for path, kind in kinds.items():
        if path not in left_out:
            fields[path] = Field(out, len(fields), "numbers" if kind == "encoded" else kind)
    dataset = builder.as_dataset(
        split=split,
        decoders={"steps": tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
    )
    total = builder.info.splits[split].num_examples
    lengths: list[int] = []
    for episode in tfds.as_numpy(dataset):
        steps = dict(flatten(episode["steps"]))
        length = len(next(iter(steps.values())))
        if not length:
            continue
        for path, field in fields.items():
            values = steps[path]
            if kinds[path] == "encoded":
                values = np.stack([features[path].decode_example_np(value) for value in values])
            try:
                field.add(values)
            except ValueError as error:
                raise ValueError(f"episode {len(lengths)}: {path}: {error}") from error
        lengths.append(length)
        if len(lengths) % 10 == 0 or len(lengths) == total:
            print(len(lengths), total, flush=True)
    described = {path: field.close() for path, field in fields.items()}
    content = {"lengths": lengths, "fields": described, "left_out": left_out, "name": builder.name}
    (out / "content.json").write_text(json.dumps(content), encoding="utf-8")


def flatten_features(feature: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The features of a step by path."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.FeaturesDict):
        for key, value in feature.items():
            yield from flatten_features(value, f"{prefix}/{key}" if prefix else str(key))
    else:
        yield prefix, feature


if __name__ == "__main__":
    try:
        export(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
