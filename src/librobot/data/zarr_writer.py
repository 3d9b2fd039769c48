"""Writing the replay buffer of Diffusion Policy, Zarr v2, which diffusion_policy reads too.

The root's attributes also hold the robot's spec and each episode's instruction.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from librobot.data.episode_writer import Episode, EpisodeWriter
from librobot.data.files import write_json, written_whole
from librobot.data.sources.zarr import ATTRIBUTE
from librobot.data.sources.zarr_files import ZarrArray, ZarrStore
from librobot.data.writer import finite_spec
from librobot.errors import require
from librobot.types import RobotSpec

CHUNK_BYTES = 2e6
"""Of one chunk before compression, as diffusion_policy chooses it."""


class ZarrWriter(EpisodeWriter):
    """Appends episodes to the buffer at `root`. An episode counts when meta/episode_ends does; what a killed
    writer left beyond it is written over."""

    one_instruction = True

    def __init__(self, root: Path, spec: RobotSpec, *, jpeg: int | None = None) -> None:
        if jpeg is not None:
            raise ValueError("a replay buffer holds pixels, no JPEG; leave --jpeg out")
        super().__init__(root, spec)
        for group in ("", "data/", "meta/"):
            if not (root / f"{group}.zgroup").exists():
                write_json(root / f"{group}.zgroup", {"zarr_format": 2})
        self.ends: list[int] = []
        self.tasks: list[str] = []
        if (root / "meta/episode_ends/.zarray").exists():
            self.ends = ZarrArray(ZarrStore(root), "meta/episode_ends").all().tolist()
            self.tasks = json.loads((root / ".zattrs").read_text())[ATTRIBUTE]["instructions"]
            self.tasks = self.tasks[: len(self.ends)]

    @property
    def num_episodes(self) -> int:
        return len(self.ends)

    def store(self, episode: Episode) -> None:
        arrays = {"action": episode.action, **episode.images}
        if self.spec.state_dim:
            arrays["state"] = episode.state
        start = self.ends[-1] if self.ends else 0
        for key, values in arrays.items():
            self._append(f"data/{key}", values, start)
        self.tasks.append(episode.task)
        description = {"spec": finite_spec(self.spec), "instructions": self.tasks}
        write_json(self.root / ".zattrs", {ATTRIBUTE: description})
        self.ends.append(start + len(episode))
        ends = np.array(self.ends, np.int64)
        self._write_chunk("meta/episode_ends", 0, np.pad(ends, (0, -len(ends) % 1024)), None)
        self._describe("meta/episode_ends", ends, len(ends), len(ends) + -len(ends) % 1024, None)

    def _append(self, name: str, values: Shaped[np.ndarray, "T ..."], start: int) -> None:
        compressor = require("numcodecs", "zarr").Blosc(cname="zstd", clevel=5, shuffle=2)
        row_bytes = values.dtype.itemsize * math.prod(values.shape[1:])
        rows = max(1, round(CHUNK_BYTES / row_bytes))
        for chunk in range(start // rows, (start + len(values) - 1) // rows + 1):
            whole = np.zeros((rows, *values.shape[1:]), values.dtype)
            begin, end = max(start, chunk * rows), min(start + len(values), (chunk + 1) * rows)
            if begin > chunk * rows:  # the chunk begins with an earlier episode
                kept = np.arange(chunk * rows, begin)
                whole[: len(kept)] = ZarrArray(ZarrStore(self.root), name).read(kept)
            whole[begin - chunk * rows : end - chunk * rows] = values[begin - start : end - start]
            self._write_chunk(name, chunk, whole, compressor)
        self._describe(name, values, start + len(values), rows, compressor.get_config())

    def _write_chunk(self, name: str, chunk: int, whole: np.ndarray, compressor: Any) -> None:
        key = ".".join(map(str, (chunk, *[0] * (whole.ndim - 1))))
        with written_whole(self.root / name / key) as temporary:
            data = np.ascontiguousarray(whole)
            temporary.write_bytes(compressor.encode(data) if compressor else data.tobytes())

    def _describe(self, name: str, values: np.ndarray, length: int, rows: int, compressor: Any) -> None:
        write_json(
            self.root / name / ".zarray",
            {
                "zarr_format": 2,
                "shape": [length, *values.shape[1:]],
                "chunks": [rows, *values.shape[1:]],
                "dtype": values.dtype.str,
                "compressor": compressor,
                "fill_value": 0,
                "filters": None,
                "order": "C",
            },
        )
