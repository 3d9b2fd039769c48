"""What an offline W&B run wrote, by W&B's own record definitions."""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path


def records(path: Path) -> list:
    from wandb.proto.wandb_internal_pb2 import Record

    return [Record.FromString(data) for data in _raw(path)]


def history(found: list) -> list[dict]:
    """The rows that were logged, decoded."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]


def config(found: list) -> dict:
    items = [item for r in found for item in (*r.run.config.update, *r.config.update)]
    return {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}


def _raw(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file, which is a LevelDB log: blocks of 32 KiB, the first after 7 bytes of its
    own, in them chunks with checksum, length and kind (1 whole, 2 first, 3 middle, 4 last) before each."""
    data, block, place, record = path.read_bytes(), 32768, 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, place)
        chunk = data[place + 7 : place + 7 + length]
        assert zlib.crc32(bytes([kind]) + chunk) == checksum
        record, place = record + chunk, place + 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def videos(found: list) -> dict[str, dict]:
    """The last video of each name, with its `path` below the run's files and `size` in bytes."""
    shown = {}
    for row in history(found):
        for name, value in row.items():
            if isinstance(value, dict) and value.get("_type") == "video-file":
                shown[name] = value
            elif name.endswith("/_type") and value == "video-file":  # written key by key
                stem = name.removesuffix("/_type")
                shown[stem] = {key: row[f"{stem}/{key}"] for key in ("path", "size")}
    return shown
