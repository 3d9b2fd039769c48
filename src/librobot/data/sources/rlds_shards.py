"""A shard of a TFDS folder, read through once: the numbers and texts that were asked for, and where pictures
lie."""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from librobot.data.sources import tfrecords
from librobot.data.sources.rlds_features import Field
from librobot.data.sources.tfrecords import Record, Span


def scan_shard(path: Path, fields: Mapping[str, Field], expected: int) -> dict[str, np.ndarray]:
    """The steps of all records, in their order, by the paths of `fields`:

    records (e,) numbers of the records, lengths (e,) their steps, problems (e,) what is wrong with one, ""
    for nothing (one with a problem has no steps); numbers/PATH (n, *shape) in the field's own dtype;
    texts/PATH (t,) and text_of_row/PATH (n,); places/PATH (n, 2) offset and size in the file. broken (): what
    is wrong with the shard, "" for nothing: cut short, missing, or not of as many records as `expected`.
    """
    kept: dict[str, list[Any]] = {name: [] for name in fields}
    numbers: list[int] = []
    lengths: list[int] = []
    problems: list[str] = []
    broken, count = "", 0
    try:
        with path.open("rb") as file, _mapped(file) as data:
            for record in tfrecords.records(data):
                count += 1
                values: dict[str, Any] = {}
                length, problem = 0, record.problem
                if not problem:
                    try:
                        values, length = _steps(data, record, fields)
                    except ValueError as error:
                        problem = str(error)
                if not problem and not length:
                    continue  # as TFDS's own reader gives no step of it
                numbers.append(record.number)
                lengths.append(length)
                problems.append(f"{path}: record {record.number}: {problem}" if problem else "")
                for name, value in values.items():
                    kept[name].append(value)
    except FileNotFoundError:
        broken = f"{path}: missing; copy the dataset again"
    except ValueError as error:
        broken = f"{path}: {error}; copy the file again"
    if not broken and count != expected:
        said = f"expected {expected} records as dataset_info.json says, found {count}"
        broken = f"{path}: {said}; copy the file again"
    arrays = {
        "records": np.array(numbers, np.int64),
        "lengths": np.array(lengths, np.int64),
        "problems": np.array(problems, np.str_),
        "broken": np.array(broken),
    }
    for name, field in fields.items():
        arrays |= _joined(name, field, kept[name])
    return arrays


def _mapped(file: Any) -> Any:
    if not os.fstat(file.fileno()).st_size:
        raise ValueError("the file is empty")
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _steps(data: Any, record: Record, fields: Mapping[str, Field]) -> tuple[dict[str, Any], int]:
    """Every field's values of a record, and for how many steps they are. Raises ValueError where they do not
    agree."""
    found = tfrecords.features(data, record.span)
    values: dict[str, Any] = {}
    length: int | None = None
    for name, field in fields.items():
        kind, span = found.get(field.key, (tfrecords.EMPTY, (0, 0)))
        try:
            value = values[name] = _values(data, kind, span, field)
        except (ValueError, zlib.error) as error:
            raise ValueError(f"{name}: {error}") from error
        length = len(value) if length is None else length
        if len(value) != length:
            raise ValueError(
                f"{name}: expected {length} steps as of {next(iter(fields))}, found {len(value)}; write the "
                "dataset again"
            )
    return values, length or 0


def _values(data: Any, kind: int, span: Span, field: Field) -> Any:
    """One value for each step: numbers (steps, *shape), texts, or where the bytes of a picture are."""
    if field.kind == "numbers":
        wanted = tfrecords.FLOAT_LIST if np.dtype(field.dtype).kind == "f" else tfrecords.INT64_LIST
    else:
        wanted = tfrecords.BYTES_LIST
    if kind not in (wanted, tfrecords.EMPTY):
        raise ValueError(
            f"expected a list of {tfrecords.KINDS[wanted]}, found one of {tfrecords.KINDS[kind]}"
        )
    if wanted == tfrecords.FLOAT_LIST:
        return _shaped(tfrecords.float_values(data, span), field.shape).astype(field.dtype)
    if wanted == tfrecords.INT64_LIST:
        return _shaped(tfrecords.int_values(data, span), field.shape).astype(field.dtype)
    places = tfrecords.byte_values(data, span)
    if field.kind == "picture":
        return places
    texts = [data[begin:end] for begin, end in places]
    if field.kind == "text":
        return [text.decode("utf-8", "replace") for text in texts]
    arrays = [np.frombuffer(zlib.decompress(text) if field.zlib else text, field.dtype) for text in texts]
    for array in arrays:
        if array.size != np.prod(field.shape, dtype=np.int64):
            raise ValueError(f"expected an array of shape {field.shape}, found {array.size} numbers")
    return _shaped(np.concatenate([np.zeros(0, field.dtype), *arrays]), field.shape)


def _shaped(flat: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    each = int(np.prod(shape, dtype=np.int64))
    if not each or len(flat) % each:
        raise ValueError(f"expected arrays of shape {shape}, found {len(flat)} numbers in all")
    return flat.reshape(-1, *shape)


def _joined(name: str, field: Field, values: list[Any]) -> dict[str, np.ndarray]:
    """The values of all records as arrays."""
    if field.kind in ("numbers", "encoded"):
        none = np.zeros((0, *field.shape), field.dtype)
        return {f"numbers/{name}": np.concatenate([none, *values])}
    flat = [value for each in values for value in each]
    if field.kind == "picture":
        spans = np.array(flat, np.int64).reshape(-1, 2)
        return {f"places/{name}": np.stack([spans[:, 0], spans[:, 1] - spans[:, 0]], axis=1)}
    texts = list(dict.fromkeys(flat))
    number = {text: i for i, text in enumerate(texts)}
    return {
        f"texts/{name}": np.array(texts, np.str_),
        f"text_of_row/{name}": np.array([number[text] for text in flat], np.int64),
    }
