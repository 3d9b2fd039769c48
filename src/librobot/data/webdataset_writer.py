"""Writing WebDataset: tar shards with a sample for each step, which the webdataset library reads.

shard-000000.tar    EPISODE-STEP.CAMERA.png, .state.npy, .action.npy and .json ({"prompt", "last"})
librobot.json       the robot's spec, and how far the shards are written
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from librobot.data.episode_writer import Episode, EpisodeWriter
from librobot.data.files import write_json
from librobot.data.format import is_feature_name
from librobot.data.spec_file import SPEC
from librobot.data.writer import finite_spec
from librobot.types import RobotSpec

SHARD_BYTES = 500 * 2**20
"""A shard that has grown beyond is closed; an episode lies in one shard."""
END = b"\0" * 1024


class WebDatasetWriter(EpisodeWriter):
    """An episode counts when librobot.json does; what a killed writer left beyond it is cut off."""

    def __init__(
        self, root: Path, spec: RobotSpec, *, jpeg: int | None = None, shard_bytes: int = SHARD_BYTES
    ) -> None:
        names = [name.casefold() for name in spec.camera_names]  # webdataset lowers the names of members
        for name in spec.camera_names:
            if not is_feature_name(name) or names.count(name.casefold()) > 1:
                raise ValueError(
                    f"camera name {name!r}: only letters, digits, spaces and _-. may be used, and two names "
                    "must differ by more than their capitals"
                )
        super().__init__(root, spec, jpeg=jpeg)
        self.shard_bytes = shard_bytes
        self.shards: list[dict[str, int]] = []
        if (root / SPEC).exists():
            self.shards = json.loads((root / SPEC).read_text(encoding="utf-8"))["shards"]

    @property
    def num_episodes(self) -> int:
        return sum(shard["episodes"] for shard in self.shards)

    def store(self, episode: Episode) -> None:
        if not self.shards or self.shards[-1]["bytes"] > self.shard_bytes:
            self._close()
            self.shards.append({"episodes": 0, "bytes": 0})
        last = self.shards[-1]
        with self._path(len(self.shards) - 1).open("ab") as file:
            file.truncate(last["bytes"])
            for name, data in self._members(episode):
                file.write(_header(name, len(data)))
                file.write(data + b"\0" * (-len(data) % 512))
            end = file.tell()
        self.shards[-1] = {"episodes": last["episodes"] + 1, "bytes": end}
        self._describe()

    def finalize(self) -> None:
        self._close()

    def _path(self, shard: int) -> Path:
        return self.root / f"shard-{shard:06d}.tar"

    def _describe(self) -> None:
        write_json(self.root / SPEC, {"spec": finite_spec(self.spec), "shards": self.shards})

    def _close(self) -> None:
        """Write the end of the last shard, beyond the bytes that count."""
        if self.shards:
            with self._path(len(self.shards) - 1).open("ab") as file:
                file.truncate(self.shards[-1]["bytes"])
                file.write(END)

    def _members(self, episode: Episode) -> Iterator[tuple[str, bytes]]:
        for step in range(len(episode)):
            key = f"{self.num_episodes:06d}-{step:06d}"
            for camera, frames in episode.images.items():
                suffix = "png" if self.jpeg is None else "jpg"
                yield f"{key}.{camera}.{suffix}", self.encoded(frames[step])
            if self.spec.state_dim:
                yield f"{key}.state.npy", _npy(episode.state[step])
            yield f"{key}.action.npy", _npy(episode.action[step])
            described = {"prompt": episode.tasks[step], "last": step == len(episode) - 1}
            yield f"{key}.json", json.dumps(described).encode()


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(values))
    return file.getvalue()
