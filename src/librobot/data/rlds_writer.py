"""Writing RLDS, a TFDS folder, without tensorflow in this process: `rlds_build` makes its shards.

.staging/episode-XXXXXX.npz   whole episodes that are in no shard yet: vectors, pictures, instructions
.staging/dataset.json         features and the shards that are whole
shard-XXXXX.tfrecord          those shards, renamed when the dataset is
librobot.json                 the robot's spec
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from librobot.data.episode_writer import Episode, EpisodeWriter
from librobot.data.files import write_json, written_whole
from librobot.data.format import is_feature_name
from librobot.data.rlds_build import STAGING
from librobot.data.spec_file import SPEC
from librobot.data.tensorflow_process import run_with_tensorflow
from librobot.data.writer import finite_spec
from librobot.errors import LibrobotError
from librobot.types import RobotSpec

SHARD_BYTES = 400 * 2**20
"""So much is staged before it becomes a shard."""


class RldsWriter(EpisodeWriter):
    """The observation holds `state` and the cameras by name; every step has its instruction.

    is_terminal is set at an episode's last step, as the datasets of Open X-Embodiment have it; there is no
    reward and no discount.
    """

    def __init__(
        self, root: Path, spec: RobotSpec, *, jpeg: int | None = None, shard_bytes: int = SHARD_BYTES
    ) -> None:
        for camera in spec.camera_names:
            if not is_feature_name(camera) or camera == "state":
                raise ValueError(
                    f"camera name {camera!r}: only letters, digits, spaces and _-. may be used, and the name "
                    "state is taken"
                )
        super().__init__(root, spec, jpeg=jpeg)
        self.shard_bytes = shard_bytes
        self.described: dict[str, Any] = {
            "name": re.sub(r"[^a-z0-9]+", "_", spec.name.lower()).strip("_0123456789") or "robot",
            "state_dim": spec.state_dim,
            "action_dim": spec.action_dim,
            "cameras": {camera.name: [camera.height, camera.width] for camera in spec.cameras},
            "encoding": "png" if jpeg is None else "jpeg",
            "shards": [],
        }
        if self._dataset.exists():
            self.described = json.loads(self._dataset.read_text(encoding="utf-8"))
        self._sharded = sum(shard["episodes"] for shard in self.described["shards"])
        for path in self._staged():
            if int(path.stem.removeprefix("episode-")) < self._sharded:
                path.unlink()

    @property
    def num_episodes(self) -> int:
        return self._sharded + len(self._staged())

    def store(self, episode: Episode) -> None:
        arrays = {
            "state": episode.state,
            "action": episode.action,
            "tasks": np.frombuffer(json.dumps(episode.tasks).encode(), np.uint8),
        }
        for camera, frames in episode.images.items():
            encoded = [self.encoded(frame) for frame in frames]
            arrays[f"blob/{camera}"] = np.frombuffer(b"".join(encoded), np.uint8)
            arrays[f"ends/{camera}"] = np.cumsum([len(each) for each in encoded])
        path = self.root / STAGING / f"episode-{self.num_episodes:06d}.npz"
        with written_whole(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        if sum(path.stat().st_size for path in self._staged()) > self.shard_bytes:
            self._write_shard()

    def finalize(self) -> None:
        if self._staged():
            self._write_shard()
        self._run("finish")
        write_json(self.root / SPEC, {"spec": finite_spec(self.spec)})
        shutil.rmtree(self.root / STAGING)

    @property
    def _dataset(self) -> Path:
        return self.root / STAGING / "dataset.json"

    def _staged(self) -> list[Path]:
        return sorted((self.root / STAGING).glob("episode-??????.npz"))

    def _write_shard(self) -> None:
        write_json(self._dataset, self.described)
        self._run("shard")
        staged = self._staged()
        self.described["shards"].append({"episodes": len(staged)})
        write_json(self._dataset, self.described)  # from here on these episodes count as the shard's
        self._sharded += len(staged)
        for path in staged:
            path.unlink()

    def _run(self, what: str) -> None:
        arguments = [str(self.root), what]
        try:
            run_with_tensorflow("librobot.data.rlds_build", arguments, self.root / STAGING / "log.txt")
        except RuntimeError as error:
            raise LibrobotError(f"{self.root}: TFDS cannot write it: {error}") from error
