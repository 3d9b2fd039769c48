"""What is in MCAP files: which topics, their messages read through once, pictures by row.

The mcap library gives chunks and messages, mcap-ros2-support and mcap-protobuf-support decode them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from librobot.data.images import decode_image
from librobot.data.local_cache import LocalCache
from librobot.errors import LibrobotError, nearest, require

IMAGES = ("Image", "CompressedImage", "RawImage")
"""Of sensor_msgs and of Foxglove."""
CHANNELS = {
    "rgb8": (3, (0, 1, 2)),
    "bgr8": (3, (2, 1, 0)),
    "8UC3": (3, (2, 1, 0)),
    "rgba8": (4, (0, 1, 2)),
    "bgra8": (4, (2, 1, 0)),
    "mono8": (1, (0, 0, 0)),
    "8UC1": (1, (0, 0, 0)),
}
"""Encoding of a raw picture -> bytes of a pixel, and which of them are red, green and blue."""
CHUNK_BYTES = 64 * 2**20
"""Decompressed chunks that each camera and thread keeps at hand."""

Decode = Callable[[bytes], Any]


class McapFile:
    """A file's index. Raises LibrobotError for what is no MCAP file, was not closed, or has no chunks."""

    def __init__(self, path: Path) -> None:
        reader = require("mcap.reader", "mcap")
        records = require("mcap.records", "mcap")
        self.path = path
        try:
            with path.open("rb") as file:
                summary = reader.SeekingReader(file).get_summary()
        except Exception as error:  # the library lets struct's and its own errors through
            size = path.stat().st_size if path.exists() else 0
            raise LibrobotError(
                f"{path}: expected a whole MCAP file, found {size} bytes ({type(error).__name__}: {error}). "
                "It was cut short or never closed: copy it again, or run `mcap recover`"
            ) from error
        if summary is None or not summary.chunk_indexes:
            raise LibrobotError(f"{path}: has no index of chunks; run `mcap recover` on it")
        self.chunks = sorted(summary.chunk_indexes, key=lambda chunk: chunk.chunk_start_offset)
        self.channels: dict[int, Any] = summary.channels
        self.schemas: dict[int, Any] = summary.schemas
        self._chunk, self._message = records.Chunk, records.Message

    def schema_of(self, topic: str) -> Any:
        """The schema of the messages of `topic`, None for one without; for an unknown one LibrobotError."""
        channel = self._channel(topic)
        return self.schemas.get(channel.schema_id)

    def decoder(self, topic: str) -> Decode:
        channel = self._channel(topic)
        schema = self.schemas.get(channel.schema_id)
        for module in ("mcap_ros2.decoder", "mcap_protobuf.decoder"):
            factory = require(module, "mcap").DecoderFactory()
            found = factory.decoder_for(channel.message_encoding, schema)
            if found is not None:
                return found
        raise LibrobotError(
            f"{self.path}: {topic}: expected messages of ROS 2 (cdr, ros2msg) or protobuf, found "
            f"{channel.message_encoding!r}, schema {schema.encoding if schema else None!r}"
        )

    def messages(self, chunk: int, topics: Sequence[str] | None = None) -> Iterator[tuple[int, str, Any]]:
        """(number in the chunk, topic, message) of a chunk, decompressed. Raises LibrobotError."""
        streams = require("mcap.stream_reader", "mcap")
        data = require("mcap.data_stream", "mcap")
        try:
            with self.path.open("rb") as file:
                file.seek(self.chunks[chunk].chunk_start_offset + 9)  # past the record's opcode and length
                size = self.chunks[chunk].chunk_length - 9
                read = self._chunk.read(data.ReadDataStream(io.BytesIO(file.read(size))))
            records = streams.breakup_chunk(read)
        except Exception as error:
            raise LibrobotError(
                f"{self.path}: chunk {chunk}: damaged ({type(error).__name__}: {error}); copy the file again"
            ) from error
        for number, record in enumerate(records):
            if isinstance(record, self._message):
                topic = self.channels[record.channel_id].topic
                if topics is None or topic in topics:
                    yield number, topic, record

    def image_topics(self) -> list[str]:
        found = []
        for channel in self.channels.values():
            schema = self.schemas.get(channel.schema_id)
            if schema is not None and schema.name.replace(".", "/").rpartition("/")[2] in IMAGES:
                found.append(channel.topic)
        return sorted(set(found))

    def _channel(self, topic: str) -> Any:
        topics = {channel.topic: channel for channel in self.channels.values()}
        if topic not in topics:
            raise LibrobotError(f"{self.path}: no topic {topic!r}; {nearest(topic, topics)}")
        return topics[topic]


@dataclass(frozen=True)
class Wanted:
    """What a scan keeps. values: (topic, fields, joints) of numbers; texts: (topic, field); stamps: "log",
    when the recorder got a message, or "header", what its sender wrote into it, where it has
    a header."""

    pictures: tuple[str, ...]
    values: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]
    texts: tuple[tuple[str, str], ...]
    stamps: str


def scan_file(path: Path, wanted: Wanted) -> dict[str, np.ndarray]:
    """For every topic its messages' stamps in ns, "stamps/TOPIC"; "where/TOPIC" (n, 2), chunk and number of
    pictures; "values/i" (n, dims) float64, the i-th of `wanted.values`; "texts/i"; "names/i": a joint state's
    own names of the values."""
    file = McapFile(path)
    topics = {*wanted.pictures, *(v[0] for v in wanted.values), *(t[0] for t in wanted.texts)}
    decoders = {topic: file.decoder(topic) for topic in sorted(topics)}
    decoded = topics - set(wanted.pictures) if wanted.stamps == "log" else topics
    stamps: dict[str, list[int]] = {topic: [] for topic in topics}
    where: dict[str, list[tuple[int, int]]] = {topic: [] for topic in wanted.pictures}
    values: list[list[np.ndarray]] = [[] for _ in wanted.values]
    texts: list[list[str]] = [[] for _ in wanted.texts]
    names: list[list[str]] = [[] for _ in wanted.values]
    for chunk in range(len(file.chunks)):
        for number, topic, message in file.messages(chunk, sorted(topics)):
            place = f"{path}: {topic}: message {len(stamps[topic])}"
            content = decoders[topic](message.data) if topic in decoded else None
            stamps[topic].append(_stamp(message, content, wanted.stamps, place))
            if topic in where:
                where[topic].append((chunk, number))
            for i, (_, fields, joints) in enumerate(wanted.values):
                if wanted.values[i][0] == topic:
                    own = list(getattr(content, "name", ()))
                    value = _vector(content, fields, joints, own, place)
                    if values[i] and len(values[i][0]) != len(value):
                        raise LibrobotError(
                            f"{place}: expected {len(values[i][0])} values as before, found {len(value)}"
                        )
                    values[i].append(value)
                    names[i] = names[i] or list(joints) or (own if len(own) == len(value) else [])
            for i, (text_topic, field) in enumerate(wanted.texts):
                if text_topic == topic:
                    texts[i].append(str(_field(content, field, place)))
    return {
        **{f"stamps/{topic}": np.array(times, np.int64) for topic, times in stamps.items()},
        **{f"where/{topic}": np.array(w, np.int64).reshape(-1, 2) for topic, w in where.items()},
        **{
            f"values/{i}": np.array(v, np.float64).reshape(len(v), -1 if v else 0)
            for i, v in enumerate(values)
        },
        **{f"texts/{i}": np.array(each, np.str_) for i, each in enumerate(texts)},
        **{f"names/{i}": np.array(each, np.str_) for i, each in enumerate(names)},
    }


def _stamp(message: Any, content: Any, stamps: str, place: str) -> int:
    if stamps == "log":
        return int(message.log_time)
    if hasattr(content, "timestamp"):  # Foxglove's
        return int(content.timestamp.seconds) * 10**9 + int(content.timestamp.nanos)
    if not hasattr(content, "header"):
        return int(message.log_time)
    stamp = _field(content, "header.stamp", place)
    return int(stamp.sec) * 10**9 + int(stamp.nanosec)


def _field(content: Any, path: str, place: str) -> Any:
    for name in path.split("."):
        if not hasattr(content, name):
            known = [
                n for n in (getattr(content, "__slots__", None) or dir(content)) if not n.startswith("_")
            ]
            raise LibrobotError(f"{place}: no field {path!r}: {nearest(name, known)}")
        content = getattr(content, name)
    return content


def _vector(
    content: Any, fields: Sequence[str], joints: Sequence[str], own: Sequence[str], place: str
) -> np.ndarray:
    parts = []
    for field in fields:
        try:
            value: np.ndarray = np.asarray(_field(content, field, place), np.float64).reshape(-1)
        except (TypeError, ValueError) as error:
            raise LibrobotError(f"{place}: {field}: expected a number or numbers: {error}") from error
        if joints:
            if len(own) != len(value):
                raise LibrobotError(f"{place}: {field}: expected one value for each of {list(own)}")
            for name in joints:
                if name not in own:
                    raise LibrobotError(f"{place}: no joint {name!r}; {nearest(name, own)}")
            value = value.take([own.index(name) for name in joints])
        parts.append(value)
    return np.concatenate(parts)


class McapColumn:
    """One camera: the message (chunk, number) `where` (n, 2) of the file `file_of_row` (n,) for each row."""

    def __init__(
        self,
        paths: Sequence[Path],
        topic: str,
        file_of_row: Int[np.ndarray, " n"],
        where: Int[np.ndarray, "n 2"],
    ) -> None:
        self.paths, self.topic, self.file_of_row, self.where = list(paths), topic, file_of_row, where
        self._open = LocalCache(self._opened, capacity=8)
        self._chunks = LocalCache(self._chunk, capacity=CHUNK_BYTES, cost=_size)

    def read(self, rows: Int[np.ndarray, " n"]) -> list[UInt8[np.ndarray, "h w 3"]]:
        images: list[UInt8[np.ndarray, "h w 3"]] = []
        last: tuple[int, int, int] | None = None
        for row in rows:
            chunk, number = (int(x) for x in self.where[row])
            place = (int(self.file_of_row[row]), chunk, number)
            if place != last:  # a slow camera's picture stands for several steps
                _, decode = self._open(place[0])
                data = self._chunks((place[0], chunk))[number]
                image = picture(decode(data), f"{self.paths[place[0]]}: {self.topic}: chunk {chunk}")
            images.append(image)
            last = place
        return images

    def _opened(self, file: int) -> tuple[McapFile, Decode]:
        opened = McapFile(self.paths[file])
        return opened, opened.decoder(self.topic)

    def _chunk(self, place: tuple[int, int]) -> dict[int, bytes]:
        file, chunk = place
        messages = self._open(file)[0].messages(chunk, [self.topic])
        return {number: message.data for number, _, message in messages}


def _size(messages: dict[int, bytes]) -> float:
    return sum(len(data) for data in messages.values())


def picture(message: Any, place: str) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of an image message, raw or compressed. Raises LibrobotError."""
    if not hasattr(message, "encoding"):
        try:
            return decode_image(bytes(message.data))
        except ValueError as error:
            raise LibrobotError(f"{place}: expected a JPEG or PNG picture: {error}") from error
    if message.encoding not in CHANNELS:
        raise LibrobotError(
            f"{place}: pictures of encoding {message.encoding!r} are not read; "
            f"{nearest(message.encoding, CHANNELS)}"
        )
    size, order = CHANNELS[message.encoding]
    height, width, step = int(message.height), int(message.width), int(message.step)
    flat = np.frombuffer(bytes(message.data), np.uint8)
    if len(flat) < height * step or step < width * size or not height * width:
        raise LibrobotError(
            f"{place}: expected {height} rows of {step} bytes for {height} x {width} {message.encoding}, "
            f"found {len(flat)} bytes"
        )
    pixels = flat[: height * step].reshape(height, step)[:, : width * size].reshape(height, width, size)
    return np.ascontiguousarray(pixels[:, :, list(order)])
