"""Writing HDF5 as ACT does (act/record_sim_episodes.py): one file for each episode, which ACT reads too.

The file also carries the instruction and the robot's spec, as attributes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from librobot.data.files import remove_temporaries, written_whole
from librobot.data.sources.hdf5_files import SPEC
from librobot.data.writer import finite_spec
from librobot.errors import require
from librobot.types import RobotSpec


class Hdf5Writer:
    """Goes on with whatever whole episodes are in `root`."""

    def __init__(self, root: Path, spec: RobotSpec) -> None:
        self.root, self.spec = root, spec
        root.mkdir(parents=True, exist_ok=True)
        remove_temporaries(root)

    @property
    def num_episodes(self) -> int:
        return len(list(self.root.glob("episode_*.hdf5")))

    def add_episode(
        self,
        *,
        images: Mapping[str, UInt8[np.ndarray, "T h w 3"]],
        state: Float[np.ndarray, "T s"],
        action: Float[np.ndarray, "T a"],
        task: str,
    ) -> None:
        """Store one episode; it is on disk, whole, when this returns."""
        h5py = require("h5py", "hdf5")
        with (
            written_whole(self.root / f"episode_{self.num_episodes}.hdf5") as temporary,
            h5py.File(temporary, "w") as file,
        ):
            file.attrs["sim"] = False
            file.attrs["instruction"] = task
            file.attrs[SPEC] = json.dumps(finite_spec(self.spec))
            file["action"] = np.asarray(action, np.float32)
            file["observations/qpos"] = np.asarray(state, np.float32)
            for name, frames in images.items():
                file.create_dataset(f"observations/images/{name}", data=frames, chunks=(1, *frames.shape[1:]))

    def finalize(self) -> None:
        """Nothing is left to do."""
