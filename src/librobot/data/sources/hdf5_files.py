"""What is in HDF5 files: groups by pattern, instructions in attributes, pictures by row."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from librobot.data.images import decode_image
from librobot.data.local_cache import LocalCache
from librobot.errors import LibrobotError, require
from librobot.types import RobotSpec

OPEN_FILES = 16
"""Per camera and thread."""

SPEC = "librobot"
"""The attribute in which our writer leaves the robot's spec, as JSON."""


def open_hdf5(path: Path) -> Any:
    """The file, for reading. Raises LibrobotError where it is missing, cut short or something else."""
    h5py = require("h5py", "hdf5")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        size = path.stat().st_size if path.exists() else None
        found = "no such file" if size is None else f"{size} bytes; {error}"
        raise LibrobotError(f"{path}: expected an HDF5 file, found {found}. Copy it again") from error


def natural(name: Any) -> list[Any]:
    """A key that sorts demo_2 before demo_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(name))]


def groups(file: Any, pattern: str) -> list[str]:
    """The groups that match, level by level ("data/*"), in natural order; [""] for no pattern."""
    found = [""]
    for level in pattern.strip("/").split("/") if pattern.strip("/") else []:
        found = [
            f"{parent}/{name}".lstrip("/")
            for parent in found
            for name in sorted(file[parent] if parent else file, key=natural)
            if fnmatch(name, level) and hasattr((file[parent] if parent else file)[name], "keys")
        ]
    return found


def attribute(file: Any, group: str, where: str, place: str) -> str | None:
    """The text at "GROUP:ATTRIBUTE" or "GROUP:ATTRIBUTE.KEY" (into JSON), None where there is none."""
    name, _, keys = where.partition(":")
    holder = file if name == "/" else (file[group] if group else file) if name == "." else file.get(name)
    if holder is None:
        return None
    first, *rest = keys.split(".")
    value = holder.attrs.get(first)
    if isinstance(value, bytes):
        value = value.decode()
    if rest and isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise LibrobotError(f"{place}: attribute {first!r} is not JSON ({error})") from error
        for key in rest:
            value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, list | tuple):  # LIBERO's instruction is a list of words in some releases
        value = " ".join(str(word) for word in value)
    if value is None:
        return None
    return str(value).strip().strip('"') if rest else str(value)


def stored_spec(path: Path) -> RobotSpec | None:
    """The robot of a file that our writer wrote, None for another's."""
    with open_hdf5(path) as file:
        described = file.attrs.get(SPEC)
    if described is None:
        return None
    try:
        return RobotSpec.from_dict(json.loads(described))
    except (TypeError, ValueError) as error:
        raise LibrobotError(
            f"{path}: attribute {SPEC!r}: expected RobotSpec.to_dict as JSON: {error}"
        ) from error


class Hdf5Column:
    """One camera over all episodes: raw pictures (T, h, w, 3) or (T, 3, h, w), or encoded ones, (T, bytes)
    with zeros at the end or one array of bytes per step."""

    def __init__(
        self, files: Sequence[Path], datasets: Sequence[str], lengths: Int[np.ndarray, " e"], rotate: bool
    ) -> None:
        self.files, self.datasets, self.rotate = list(files), list(datasets), rotate
        self.ends = np.cumsum(lengths)
        self._open = LocalCache(open_hdf5, capacity=OPEN_FILES)

    def read(self, rows: Int[np.ndarray, " n"]) -> list[UInt8[np.ndarray, "h w 3"]]:
        """The pictures of ascending `rows`."""
        images: list[UInt8[np.ndarray, "h w 3"]] = []
        episodes = np.searchsorted(self.ends, rows, side="right")
        for episode in np.unique(episodes):
            start = int(self.ends[episode - 1]) if episode else 0
            frames = rows[episodes == episode] - start
            dataset = self._open(self.files[episode])[self.datasets[episode]]
            place = f"{self.files[episode]}: {self.datasets[episode]}"
            for run in np.split(frames, np.flatnonzero(np.diff(frames) != 1) + 1):
                try:
                    block = dataset[int(run[0]) : int(run[-1]) + 1]
                except OSError as error:
                    raise LibrobotError(
                        f"{place}: frame {run[0]}: cannot be read ({error}); copy the file again"
                    ) from error
                images += [
                    self._picture(value, f"{place}: frame {frame}")
                    for frame, value in zip(run, block, strict=True)
                ]
        return images

    def _picture(self, value: np.ndarray, place: str) -> UInt8[np.ndarray, "h w 3"]:
        image = _decoded(value, place)
        return np.ascontiguousarray(image[::-1, ::-1]) if self.rotate else image

    @staticmethod
    def size(dataset: Any, place: str) -> tuple[int, int]:
        """Height and width. Raises LibrobotError for what holds no pictures."""
        return _decoded(dataset[0], f"{place}: {dataset.name}").shape[:2]


def _decoded(value: Any, place: str) -> UInt8[np.ndarray, "h w 3"]:
    value = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else np.asarray(value)
    if value.dtype == np.uint8 and value.ndim == 3 and 3 in (value.shape[0], value.shape[2]):
        return value if value.shape[2] == 3 else value.transpose(1, 2, 0)
    if value.ndim == 1 and value.dtype.itemsize == 1:
        try:
            return decode_image(value.tobytes())
        except ValueError as error:
            raise LibrobotError(f"{place}: expected an encoded picture: {error}") from error
    raise LibrobotError(
        f"{place}: expected a picture, uint8 (h, w, 3), (3, h, w) or encoded bytes, found {value.dtype} "
        f"{value.shape}"
    )
