"""TFRecord files and the tf.train.Examples in them, by their published layout, without tensorflow.

A record is its length (uint64), a checksum of that, the data, and a checksum of the data; both are masked
CRC32C (tensorflow/core/lib/io/record_writer.h). The data of TFDS's records is a tf.train.Example: a protobuf
message of a map from names to lists of bytes, float32 or int64 (tensorflow/core/example/feature.proto).
Functions work on the bytes of a mapped file and give places in it: what nobody asked for is not copied.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from jaxtyping import Float32, Int64

Span = tuple[int, int]
"""Begin and end in the file, in bytes."""

VARINT, FIXED64, MESSAGE, FIXED32 = 0, 1, 2, 5
"""Protobuf's wire types."""
BYTES_LIST, FLOAT_LIST, INT64_LIST = 1, 2, 3
KINDS = {BYTES_LIST: "bytes", FLOAT_LIST: "float32", INT64_LIST: "int64"}
"""The lists of tensorflow.Feature by their field numbers."""
EMPTY = 0
"""A Feature without a list: one of length 0 of any kind."""


@dataclass(frozen=True)
class Record:
    """Its number in the file, where its data lies, and what is wrong with it ("" for nothing)."""

    number: int
    span: Span
    problem: str = ""


def records(data: Any) -> Iterator[Record]:
    """The records of a file's bytes. One whose data does not agree with its checksum has a `problem`, and the
    records after it follow. Raises ValueError, with the record's number, where none can be found any more."""
    begin, number, size = 0, 0, len(data)
    while begin < size:
        if size - begin < 16:
            raise ValueError(f"record {number}: the file ends within its header, at byte {begin}")
        length, checksum = struct.unpack_from("<QI", data, begin)
        if masked_checksum(data[begin : begin + 8]) != checksum:
            raise ValueError(f"record {number}: its length at byte {begin} does not agree with its checksum")
        first, end = begin + 12, begin + 12 + length
        if end + 4 > size:
            raise ValueError(
                f"record {number}: expected {length} bytes from byte {first} on, the file ends after "
                f"{size - first}"
            )
        agrees = masked_checksum(data[first:end]) == struct.unpack_from("<I", data, end)[0]
        yield Record(number, (first, end), "" if agrees else "its bytes do not agree with its checksum")
        begin, number = end + 4, number + 1


def masked_checksum(data: bytes) -> int:
    """CRC32C, rotated and moved by a constant (tensorflow/core/lib/hash/crc32c.h)."""
    checksum = google_crc32c.value(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def features(data: Any, span: Span) -> dict[str, tuple[int, Span]]:
    """The features of an Example: name -> (BYTES_LIST, FLOAT_LIST, INT64_LIST or EMPTY, where the list is).
    Raises ValueError for what is no Example."""
    found: dict[str, tuple[int, Span]] = {}
    for example_field, in_example in _fields(data, span):
        if example_field != 1:
            continue
        for features_field, entry in _fields(data, in_example):
            if features_field != 1:
                continue
            name, kind, content = "", EMPTY, (0, 0)
            for entry_field, value in _fields(data, entry):
                if entry_field == 1:
                    name = data[value[0] : value[1]].decode("utf-8")
                elif entry_field == 2:
                    for kind, content in _fields(data, value):  # noqa: B007 the last of a oneof counts
                        pass
            if kind not in (EMPTY, *KINDS):
                raise ValueError(f"{name}: expected a list of bytes, float32 or int64, found field {kind}")
            found[name] = (kind, content)
    return found


def byte_values(data: Any, span: Span) -> list[Span]:
    """Where the values of a BytesList lie."""
    return [value for field, value in _fields(data, span) if field == 1]


def float_values(data: Any, span: Span) -> Float32[np.ndarray, " n"]:
    parts = [
        np.frombuffer(data[begin:end], "<f4")
        for field, (begin, end) in _fields(data, span, FIXED32)
        if field == 1
    ]
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, "<f4"), *parts])


def int_values(data: Any, span: Span) -> Int64[np.ndarray, " n"]:
    parts = [varints(data[begin:end]) for field, (begin, end) in _fields(data, span, VARINT) if field == 1]
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int64), *parts])


def varints(data: bytes) -> Int64[np.ndarray, " n"]:
    """Packed varints: seven bits a byte, the lowest first, the eighth set in all but a number's last byte."""
    raw = np.frombuffer(data, np.uint8)
    last = raw < 128
    if last.all():
        return raw.astype(np.int64)
    ends = np.flatnonzero(last)
    if not last[-1]:
        raise ValueError("a list of integers ends within a number")
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(raw)) - np.repeat(starts, ends - starts + 1)
    if place.max() > 9:
        raise ValueError("a list of integers holds a number of more than ten bytes")
    parts = (raw & 127).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.add.reduceat(parts, starts).astype(np.int64)


def _fields(data: Any, span: Span, scalar: int | None = None) -> Iterator[tuple[int, Span]]:
    """The fields of the message in `span` that are messages, bytes, packed numbers or, where it is named, of
    the wire type `scalar`: (field number, where its content is). Others are passed over.

    Raises ValueError where the bytes are no message.
    """
    at, end = span
    while at < end:
        tag, at = _varint(data, at, end)
        wire = tag & 7
        if wire == MESSAGE:
            size, at = _varint(data, at, end)
        elif wire == VARINT:
            size = _varint(data, at, end)[1] - at
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"no tf.train.Example: wire type {wire} at byte {at}")
        if at + size > end:
            raise ValueError(f"no tf.train.Example: a field at byte {at} is longer than what holds it")
        if wire in (MESSAGE, scalar):
            yield tag >> 3, (at, at + size)
        at += size


def _varint(data: Any, at: int, end: int) -> tuple[int, int]:
    """A number and where it ends."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError(f"no tf.train.Example: a number at byte {at} does not end")
