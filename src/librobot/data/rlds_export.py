"""The only program of librobot that imports tensorflow: a TFDS folder becomes plain files, once.

    python -m librobot.data.rlds_export FOLDER SPLIT OUT

Every step of every episode in the dataset's order, without shuffling; pictures stay encoded as they are.
OUT gets content.json ({"lengths", "fields": {path: {"file", "kind", ...}}, "left_out": {path: why}}) and for
each field

    numbers   FILE.bin                   raw values, (steps, *shape)
    text      FILE.bin and its table     int32 index into "texts"
    picture   FILE.blob, FILE.bin        encoded bytes, int64 ends

Progress goes to stdout as "DONE TOTAL" lines of episodes. Killed and started again it goes on where OUT's
progress.json says: whatever the files hold beyond is cut off.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

PROGRESS = "progress.json"
"""How far an export that has not ended is: {"read", "lengths", "fields": {path: its `Field.state`}}."""
SECONDS = 10.0
"""Between two times that it is written."""


class Field:
    """One field of the steps, written as it comes. state: what `state` gave when the files were as they shall
    go on."""

    def __init__(self, folder: Path, number: int, kind: str, state: dict[str, Any] | None = None) -> None:
        self.name, self.kind = f"field_{number:03d}", kind
        state = state or {"bytes": 0, "end": 0, "texts": [], "dtype": "", "shape": []}
        self.values = _opened(folder / f"{self.name}.bin", state["bytes"])
        self.blob = _opened(folder / f"{self.name}.blob", state["end"]) if kind == "picture" else None
        self.end = state["end"]
        self.texts = {text: i for i, text in enumerate(state["texts"])}
        self.dtype, self.shape = state["dtype"], tuple(state["shape"])

    def state(self) -> dict[str, Any]:
        """Plain values by which a new `Field` goes on; everything before is in the files."""
        self.values.flush()
        if self.blob is not None:
            self.blob.flush()
        return {
            "bytes": self.values.tell(),
            "end": self.end,
            "texts": list(self.texts),
            "dtype": self.dtype,
            "shape": list(self.shape),
        }

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


def _opened(path: Path, size: int) -> BinaryIO:
    """The file for writing after its first `size` bytes."""
    path.touch()
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file


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
    done: dict[str, Any] = {"read": 0, "lengths": [], "fields": {}}
    if (out / PROGRESS).exists():
        done = json.loads((out / PROGRESS).read_text(encoding="utf-8"))
    fields: dict[str, Field] = {}
    for path, kind in kinds.items():
        if path not in left_out:
            stored = "numbers" if kind == "encoded" else kind
            fields[path] = Field(out, len(fields), stored, done["fields"].get(path))
    total = builder.info.splits[split].num_examples
    left = done["read"] < total
    dataset = left and builder.as_dataset(
        split=f"{split}[{done['read']}:]" if done["read"] else split,
        decoders={"steps": tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
    )
    lengths: list[int] = done["lengths"]
    written = time.monotonic()
    for read, episode in enumerate(tfds.as_numpy(dataset) if left else (), done["read"] + 1):
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
        if time.monotonic() - written > SECONDS:
            states = {path: field.state() for path, field in fields.items()}
            _write(out / PROGRESS, {"read": read, "lengths": lengths, "fields": states})
            written = time.monotonic()
    described = {path: field.close() for path, field in fields.items()}
    content = {"lengths": lengths, "fields": described, "left_out": left_out, "name": builder.name}
    _write(out / "content.json", content)


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    os.replace(temporary, path)


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
