"""Arrays of the Zarr v2 format (zarr-specs, v2), read chunk by chunk from a folder or a zip file.

An own reader, because the library's version 3 runs a thread that data workers would inherit half of when they
are forked. Compression is numcodecs'.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from librobot.data.local_cache import LocalCache
from librobot.errors import LibrobotError, require

CHUNK_BYTES = 64 * 2**20
"""Decompressed chunks that each thread keeps at hand, for each array."""


class ZarrStore:
    """The files of a Zarr hierarchy: a folder, or a zip of one."""

    def __init__(self, root: Path) -> None:
        if not root.exists():
            raise LibrobotError(f"{root}: no such file or folder; expected a Zarr folder or a .zip of one")
        self.root = root
        self._zip = LocalCache(_open_zip, capacity=1) if root.is_file() else None
        if self._zip is not None and not zipfile.is_zipfile(root):
            raise LibrobotError(f"{root}: expected a Zarr folder or a .zip of one, found another file")

    def read(self, name: str) -> bytes | None:
        """The file's bytes, None where there is none."""
        try:
            return self._zip(self.root).read(name) if self._zip else (self.root / name).read_bytes()
        except (FileNotFoundError, KeyError):
            return None
        except (OSError, zipfile.BadZipFile) as error:
            raise LibrobotError(f"{self.root}: {name}: cannot be read ({error}); copy it again") from error

    def json(self, name: str) -> dict[str, Any] | None:
        data = self.read(name)
        if data is None:
            return None
        try:
            return json.loads(data)
        except json.JSONDecodeError as error:
            raise LibrobotError(f"{self.root}: {name}: not JSON ({error}); copy it again") from error

    def arrays(self, group: str) -> list[str]:
        """The names of the arrays directly in `group`, sorted."""
        if self._zip is None:
            return sorted(path.parent.name for path in (self.root / group).glob("*/.zarray"))
        names = (name.removeprefix(f"{group}/").split("/") for name in self._zip(self.root).namelist())
        return sorted(parts[0] for parts in names if len(parts) == 2 and parts[1] == ".zarray")


class ZarrArray:
    """One array, indexed by its first axis. Raises LibrobotError for what is missing or damaged."""

    def __init__(self, store: ZarrStore, name: str) -> None:
        self.store, self.name = store, name
        meta = store.json(f"{name}/.zarray")
        if meta is None:
            parent = name.rpartition("/")[0]
            newer = store.read("zarr.json") is not None
            raise LibrobotError(
                f"{store.root}: no array {name!r}; "
                + ("the folder is of Zarr v3, v2 is read" if newer else f"found {store.arrays(parent)}")
            )
        self.shape, self.chunks = tuple(meta["shape"]), tuple(meta["chunks"])
        self.dtype, self.order, self.fill = np.dtype(meta["dtype"]), meta["order"], meta["fill_value"]
        self.separator = meta.get("dimension_separator", ".")
        self._codecs = [c for c in (*(meta.get("filters") or ()), meta["compressor"]) if c is not None]
        self._load = LocalCache(self._rows_of_chunk, capacity=CHUNK_BYTES, cost=_nbytes)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, rows: Int[np.ndarray, " n"]) -> Shaped[np.ndarray, "n ..."]:
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        chunks = rows // self.chunks[0]
        for chunk in np.unique(chunks):
            chosen = np.flatnonzero(chunks == chunk)
            out[chosen] = self._load(int(chunk))[rows[chosen] - chunk * self.chunks[0]]
        return out

    def all(self) -> Shaped[np.ndarray, "n ..."]:
        return self.read(np.arange(len(self)))

    def chunk_key(self, index: tuple[int, ...]) -> str:
        return f"{self.name}/{self.separator.join(map(str, index)) or '0'}"

    def _rows_of_chunk(self, first: int) -> np.ndarray:
        """The rows [first * chunk, ...) over all other axes."""
        out = np.empty((self.chunks[0], *self.shape[1:]), self.dtype)
        for rest in np.ndindex(*(-(-n // c) for n, c in zip(self.shape[1:], self.chunks[1:], strict=True))):
            begins = [i * c for i, c in zip(rest, self.chunks[1:], strict=True)]
            places = tuple(
                slice(b, min(b + c, n))
                for b, c, n in zip(begins, self.chunks[1:], self.shape[1:], strict=True)
            )
            inner = tuple(slice(0, place.stop - place.start) for place in places)
            out[:, *places] = self._chunk((first, *rest))[:, *inner]
        return out

    def _chunk(self, index: tuple[int, ...]) -> np.ndarray:
        key = self.chunk_key(index)
        data = self.store.read(key)
        if data is None:
            if self.fill is None:
                raise LibrobotError(f"{self.store.root}: {key}: missing; copy the data again")
            return np.full(self.chunks, self.fill, self.dtype)
        try:
            for codec in self._decoders():
                _check_blosc(codec, data)
                data = codec.decode(data)
            return np.frombuffer(data, self.dtype).reshape(self.chunks, order=self.order)
        except (RuntimeError, ValueError, OSError) as error:
            raise LibrobotError(f"{self.store.root}: {key}: damaged ({error}); copy it again") from error

    def _decoders(self) -> Iterator[Any]:
        if not self._codecs:
            return
        numcodecs = require("numcodecs", "zarr")
        for described in reversed(self._codecs):
            try:
                yield numcodecs.get_codec(dict(described))
            except ValueError as error:
                raise LibrobotError(
                    f"{self.store.root}: {self.name}: compressed by {described.get('id')!r}, which numcodecs "
                    "does not know; write the data again with another compressor"
                ) from error


def _open_zip(path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _check_blosc(codec: Any, data: Any) -> None:
    """Blosc reads as many bytes as its header says (bytes 12 to 15), also past the end of what is there."""
    if codec.codec_id == "blosc":
        found = len(memoryview(data).cast("B"))
        expected = int.from_bytes(bytes(memoryview(data).cast("B")[12:16]), "little") if found >= 16 else 16
        if found < expected:
            raise ValueError(f"expected {expected} bytes, found {found}")


def _nbytes(array: np.ndarray) -> float:
    return array.nbytes
