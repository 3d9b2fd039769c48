"""Which option of the `data=` group reads a folder or file."""

from __future__ import annotations

from pathlib import Path

from librobot.data.sources.hdf5_files import open_hdf5
from librobot.errors import LibrobotError

HDF5 = (".hdf5", ".h5")


def detect(root: str | Path) -> str:
    """lerobot, zarr, rlds, webdataset, mcap, aloha, libero or hdf5 (robomimic), by what lies in `root`.

    Raises LibrobotError for anything else.
    """
    root = Path(root).expanduser()
    if (root / "meta/info.json").exists() or (root / ".staging").exists():
        return "lerobot"
    if (root / "dataset_info.json").exists():
        return "rlds"
    if (root / "meta/episode_ends").exists() or root.suffix == ".zip":
        return "zarr"
    for suffix, name in ((".tar", "webdataset"), (".mcap", "mcap")):
        if root.suffix == suffix or any(root.glob(f"*{suffix}")) or any(root.glob(f"*/*{suffix}")):
            return name
    files = (
        [root] if root.is_file() else [path for suffix in HDF5 for path in sorted(root.rglob(f"*{suffix}"))]
    )
    if files and files[0].suffix in HDF5:
        with open_hdf5(files[0]) as file:
            if "observations" in file:
                return "aloha"
            return "libero" if "data" in file and "problem_info" in file["data"].attrs else "hdf5"
    found = sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else []
    raise LibrobotError(
        f"{root}: expected a LeRobotDataset, HDF5 files, a Zarr replay buffer, tar shards, MCAP files or "
        f"a TFDS folder, found {', '.join(found) or 'nothing'}; name the format with --from"
    )
