"""Reading the data files: numeric columns once into arrays, image bytes by row when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int, UInt8

from librobot.data.images import decode_image
from librobot.data.local_cache import LocalCache
from librobot.data.metadata import Metadata, as_numpy, open_parquet
from librobot.errors import LibrobotError, nearest

ROW_GROUP_BYTES = 64 * 2**20
"""Image bytes that each thread keeps at hand."""

OPEN_FILES = 4
"""Files that each thread keeps open: to open one reads the table of all its row groups."""


def read_columns(metadata: Metadata, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """The named columns over all frames, (frames,) or (frames, dims). One file is in memory at a time.

    Raises LibrobotError for a missing column, and where a file's frames are not those that the table of
    episodes puts there.
    """
    total = int(metadata.lengths.sum())
    arrays: dict[str, np.ndarray] = {}
    start = 0
    for path, episodes in metadata.data_files():
        file = open_parquet(path, f"the frames of episodes {episodes[0]} to {episodes[-1]}")
        for column in columns:
            if column not in file.schema_arrow.names:
                raise LibrobotError(
                    f"{path}: no column {column!r}; {nearest(column, file.schema_arrow.names)}"
                )
        try:
            table = file.read(columns=[*columns, "episode_index"])
        except (pa.ArrowException, OSError) as error:
            raise LibrobotError(
                f"{path}: damaged ({error}); expected the frames of episodes {episodes[0]} to "
                f"{episodes[-1]}. Copy the file again"
            ) from error
        _check_frames(path, as_numpy(table["episode_index"]), episodes, metadata.lengths)
        for column in columns:
            values = _to_numpy(table[column], path, column)
            if column not in arrays:
                arrays[column] = np.empty((total, *values.shape[1:]), values.dtype)
            arrays[column][start : start + len(values)] = values
        start += len(table)
    return arrays


def _check_frames(path: Path, found: np.ndarray, episodes: np.ndarray, lengths: np.ndarray) -> None:
    expected = np.repeat(episodes, lengths[episodes])
    if np.array_equal(found, expected):
        return
    for episode in episodes:
        count = int((found == episode).sum())
        if count != lengths[episode]:
            raise LibrobotError(
                f"{path}: episode {episode}: expected {lengths[episode]} frames (meta/episodes), found "
                f"{count}. The table and the data are of different recordings, or the file was cut short"
            )
    raise LibrobotError(
        f"{path}: expected only episodes {episodes[0]} to {episodes[-1]} in order (meta/episodes), found "
        f"episodes {np.unique(found)[:8]}"
    )


def _to_numpy(column: pa.ChunkedArray, path: Path, name: str) -> np.ndarray:
    kind = column.type
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise LibrobotError(f"{path}: row {row}: {name} is empty; every frame must have a value")
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        flat = as_numpy(_values_of_lists(column.combine_chunks()))
        if len(column) and len(flat) % len(column):
            raise LibrobotError(f"{path}: {name}: its {len(column)} vectors differ in length")
        return flat.reshape(len(column), -1)
    return as_numpy(column)


def _values_of_lists(array: pa.Array) -> pa.Array:
    """What `array.flatten()` gives of lists none of which is null, without the 30 ms that pyarrow's functions
    take to start."""
    if pa.types.is_fixed_size_list(array.type):
        size = array.type.list_size
        return array.values.slice(array.offset * size, len(array) * size)
    first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
    return array.values.slice(first, last - first)


class ImageColumn:
    """One image feature: PNG or JPEG bytes in a struct column of the data files."""

    def __init__(self, metadata: Metadata, key: str) -> None:
        self.root, self.key = metadata.root, key
        self.ends = np.cumsum(metadata.lengths)
        self.paths = [path for path, _ in metadata.data_files()]
        files = [open_parquet(path, f"frames of {key}") for path in self.paths]
        groups = [
            (i, g, file.metadata.row_group(g).num_rows)
            for i, file in enumerate(files)
            for g in range(file.num_row_groups)
        ]
        self.groups = np.array([(i, g) for i, g, _ in groups]).reshape(-1, 2)
        self.starts = np.concatenate([[0], np.cumsum([rows for _, _, rows in groups])])
        self._open = LocalCache(pq.ParquetFile, capacity=OPEN_FILES)
        self._load = LocalCache(self._read_group, capacity=ROW_GROUP_BYTES, cost=_nbytes)

    def read(self, rows: Int[np.ndarray, " n"]) -> list[UInt8[np.ndarray, "h w 3"]]:
        """The images of ascending `rows`."""
        images = []
        for row, group in zip(rows, np.searchsorted(self.starts, rows, side="right") - 1, strict=True):
            value = self._load(int(group))[int(row - self.starts[group])].as_py()
            images.append(self._decode(value, int(row), int(group)))
        return images

    def _decode(self, value: dict | None, row: int, group: int) -> UInt8[np.ndarray, "h w 3"]:
        episode = int(np.searchsorted(self.ends, row, side="right"))
        frame = row - int(self.ends[episode - 1] if episode else 0)
        path = self.paths[self.groups[group][0]]
        place = f"{path}: episode {episode}, frame {frame}: {self.key}"
        data = value and value.get("bytes")
        if not data and value and value.get("path") and (self.root / value["path"]).is_file():
            data = (self.root / value["path"]).read_bytes()
        if not data:
            raise LibrobotError(f"{place}: expected PNG or JPEG bytes, found none")
        try:
            return decode_image(data)
        except ValueError as error:
            raise LibrobotError(f"{place}: expected a PNG or JPEG image: {error}") from error

    def _read_group(self, group: int) -> pa.StructArray:
        file, index = (int(i) for i in self.groups[group])
        try:
            table = self._open(self.paths[file]).read_row_group(index, columns=[self.key])
        except (pa.ArrowException, OSError) as error:
            first, last = np.searchsorted(self.ends, self.starts[group : group + 2] - [0, 1], side="right")
            raise LibrobotError(
                f"{self.paths[file]}: damaged ({error}); expected the frames of {self.key} of episodes "
                f"{first} to {last}. Copy the file again"
            ) from error
        return table[self.key].combine_chunks()


def _nbytes(array: pa.Array) -> float:
    return array.nbytes
