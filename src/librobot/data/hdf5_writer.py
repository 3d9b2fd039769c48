"""Writing HDF5 as ACT does (act/record_sim_episodes.py): one file for each episode, which ACT reads too.

The file also carries the instruction and the robot's spec, as attributes.
"""

from __future__ import annotations

import json

import numpy as np
from jaxtyping import UInt8

from librobot.data.episode_writer import Episode, EpisodeWriter
from librobot.data.files import written_whole
from librobot.data.sources.hdf5_files import SPEC
from librobot.data.writer import finite_spec
from librobot.errors import require


class Hdf5Writer(EpisodeWriter):
    """One file for each episode; a file there is a whole episode."""

    one_instruction = True

    @property
    def num_episodes(self) -> int:
        return len(list(self.root.glob("episode_*.hdf5")))

    def store(self, episode: Episode) -> None:
        h5py = require("h5py", "hdf5")
        with (
            written_whole(self.root / f"episode_{self.num_episodes}.hdf5") as temporary,
            h5py.File(temporary, "w") as file,
        ):
            file.attrs["sim"] = False
            file.attrs["instruction"] = episode.task
            file.attrs[SPEC] = json.dumps(finite_spec(self.spec))
            file["action"] = episode.action
            file["observations/qpos"] = episode.state
            if self.jpeg is not None:
                file.attrs["compress"] = True
            for name, frames in episode.images.items():
                stored = frames if self.jpeg is None else self._padded(frames)
                file.create_dataset(f"observations/images/{name}", data=stored, chunks=(1, *stored.shape[1:]))

    def _padded(self, frames: UInt8[np.ndarray, "T h w 3"]) -> UInt8[np.ndarray, "T bytes"]:
        """JPEG with zeros at the end, as ALOHA's recorder stores it."""
        encoded = [self.encoded(frame) for frame in frames]
        padded = np.zeros((len(encoded), max(map(len, encoded))), np.uint8)
        for row, data in zip(padded, encoded, strict=True):
            row[: len(data)] = np.frombuffer(data, np.uint8)
        return padded
