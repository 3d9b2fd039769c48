"""Bags as rosbag2 leaves them, written by the mcap libraries: an arm with a hand and two cameras."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mcap.writer import CompressionType
from mcap_ros2.writer import Writer
from PIL import Image

HEADER = """
================================================================================
MSG: std_msgs/Header
builtin_interfaces/Time stamp
string frame_id
================================================================================
MSG: builtin_interfaces/Time
int32 sec
uint32 nanosec
"""
MESSAGES = {
    "sensor_msgs/msg/JointState": "std_msgs/Header header\nstring[] name\nfloat64[] position\n" + HEADER,
    "sensor_msgs/msg/Image": "std_msgs/Header header\nuint32 height\nuint32 width\nstring encoding\n"
    "uint8 is_bigendian\nuint32 step\nuint8[] data\n" + HEADER,
    "sensor_msgs/msg/CompressedImage": "std_msgs/Header header\nstring format\nuint8[] data\n" + HEADER,
    "std_msgs/msg/Float64MultiArray": "float64[] data\n",
    "std_msgs/msg/String": "string data\n",
}
JOINTS = ["lift", "elbow", "wrist"]


def header(time: float) -> dict[str, Any]:
    nanoseconds = round(time * 1e9)
    stamp = {"sec": nanoseconds // 10**9, "nanosec": nanoseconds % 10**9}
    return {"stamp": stamp, "frame_id": "base"}


def joints(time: float) -> dict[str, Any]:
    """Every value tells its time."""
    return {"header": header(time), "name": JOINTS, "position": [time, time + 0.1, -time]}


def raw_picture(time: float, encoding: str = "bgr8") -> dict[str, Any]:
    """4 x 6 pixels in rows of 20 bytes; the red of the first tells the time in hundredths of a second."""
    rows = np.zeros((4, 20), np.uint8)
    rows[:, :18] = np.arange(18)
    rows[0, 2] = round(time * 100) % 256
    shape = {"height": 4, "width": 6, "encoding": encoding, "is_bigendian": 0, "step": 20}
    return {"header": header(time), **shape, "data": rows.tobytes()}


def compressed_picture(time: float) -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), round(time * 100) % 256, np.uint8)).save(file, "PNG")
    return {"header": header(time), "format": "png", "data": file.getvalue()}


Messages = Sequence[tuple[str, str, float, dict[str, Any]]]
"""(topic, type, time, content)."""


def recording(seconds: float, begin: float = 1.0) -> list[tuple[str, str, float, dict[str, Any]]]:
    """Joints at 50 Hz, commands at 20 Hz, a raw camera at 10 Hz and a compressed one at 5 Hz, which begins
    late; one instruction."""
    found: list[tuple[str, str, float, dict[str, Any]]] = []

    def every(topic: str, kind: str, first: float, period: float, make: Any) -> None:
        for i in range(round((seconds - first) / period) + 1):
            time = begin + first + i * period
            found.append((topic, kind, time, make(time)))

    every("/joint_states", "sensor_msgs/msg/JointState", 0.0, 0.02, joints)
    command = "std_msgs/msg/Float64MultiArray"
    every("/command", command, 0.01, 0.05, lambda time: {"data": [2 * time, 7.0]})
    every("/cameras/top/image_raw", "sensor_msgs/msg/Image", 0.03, 0.1, raw_picture)
    every("/wrist/image_raw/compressed", "sensor_msgs/msg/CompressedImage", 0.15, 0.2, compressed_picture)
    found.append(("/task", "std_msgs/msg/String", begin + 0.001, {"data": "stack the cups"}))
    return sorted(found, key=lambda message: message[2])


def write_bag(path: Path, messages: Messages, *, chunk_size: int = 2000, **options: Any) -> Path:
    """Times are log times; chunks are small, so that there are several."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compression = options.get("compression", CompressionType.ZSTD)
    with path.open("wb") as file, Writer(file, chunk_size=chunk_size, compression=compression) as writer:
        schemas = {kind: writer.register_msgdef(kind, text) for kind, text in MESSAGES.items()}
        for topic, kind, time, content in messages:
            nanoseconds = round(time * 1e9)
            writer.write_message(topic, schemas[kind], content, nanoseconds, nanoseconds)
    return path
