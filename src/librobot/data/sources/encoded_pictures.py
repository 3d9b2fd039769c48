"""Encoded pictures at known places of a dataset's files, by row."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from librobot.data.images import decode_image
from librobot.data.local_cache import LocalCache
from librobot.errors import LibrobotError

OPEN_FILES = 16
"""Per camera and thread."""


class EncodedColumn:
    """One camera: a PNG or JPEG for each row, at `places` (n, 2), offset and size in bytes, of
    paths[file_of_row] (n,)."""

    def __init__(
        self, paths: Sequence[Path], file_of_row: Int[np.ndarray, " n"], places: Int[np.ndarray, "n 2"]
    ) -> None:
        self.paths, self.file_of_row, self.places = list(paths), file_of_row, places
        self._open = LocalCache(_open, capacity=OPEN_FILES)

    def read(self, rows: Int[np.ndarray, " n"]) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        for file, (begin, size) in zip(
            self.file_of_row[rows].tolist(), self.places[rows].tolist(), strict=True
        ):
            path = self.paths[file]
            data = os.pread(self._open(path).fileno(), size, begin)
            try:
                yield decode_image(data)
            except ValueError as error:
                raise LibrobotError(
                    f"{path}: byte {begin}: expected a picture of {size} bytes: {error}"
                ) from error


def _open(path: Path) -> Any:
    return path.open("rb")
