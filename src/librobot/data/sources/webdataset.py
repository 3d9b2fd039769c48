"""WebDataset: tar shards with one sample for each step, read at random and so resumed exactly.

SHARD.tar holds, for every step, members of one name: EPISODE-STEP.CAMERA.png (or .jpg),
EPISODE-STEP.state.npy, EPISODE-STEP.action.npy, EPISODE-STEP.json. The webdataset library reads the same
shards, as a stream.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from librobot.data.remote import local_root
from librobot.data.scans import scanned
from librobot.data.sources.base import Cache, OnError
from librobot.data.sources.encoded_pictures import EncodedColumn
from librobot.data.sources.hdf5_files import natural
from librobot.data.sources.stored import Column, Episodes, StoredSource, read_each
from librobot.data.sources.tar_shards import Members, picture_name, scan_shard
from librobot.data.spec_file import read_spec
from librobot.errors import LibrobotError, nearest
from librobot.types import Camera, Dim, RobotSpec

KEY = r"(?P<episode>.+)-(?P<step>\d+)"


@dataclass
class ShardEpisode:
    """An episode as found: (shard, its rows in the shard's scan), more than one where it goes on in the next
    shard."""

    name: str
    place: str
    parts: list[tuple[int, np.ndarray]] = field(default_factory=list)
    problem: str = ""


class WebDatasetSource(StoredSource):
    """A folder of tar shards, or one of them. Shards are read through once, and what they hold is kept in
    $LIBROBOT_CACHE/webdataset; pictures are read from the shards when asked for.

    key, state, action, prompt: see `tar_shards.Members`; state None: state.npy where the first sample has it.
    pictures: camera -> member ("front" or "front.png"); None: every picture, under its member's name. robot,
    control_hz: over what the shards' librobot.json says.

    Raises LibrobotError, by shard and sample, for members that are missing, shapes that differ, steps that
    are missing and shards cut short.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        files: str = "*.tar",
        key: str = KEY,
        state: Sequence[str] | None = None,
        action: Sequence[str] = ("action.npy",),
        prompt: str | None = "json:prompt",
        pictures: Mapping[str, str] | None = None,
        cameras: Sequence[str] | None = None,
        image_size: Sequence[int] | None = None,
        cache: Cache = "none",
        cache_dir: str | Path | None = None,
        robot: str | None = None,
        control_hz: float | None = None,
        on_error: OnError = "raise",
    ) -> None:
        root = local_root(root)
        paths = _shards(root, files)
        if {"episode", "step"} - set(re.compile(key).groupindex):
            raise ValueError(f"key: expected a regular expression with the groups episode and step: {key}")
        described = read_spec(root if root.is_dir() else root.parent)
        if state is None:
            state = ["state.npy"] if _has_state(paths[0], described) else []
        wanted = Members(key, tuple(state), tuple(action), prompt)
        scans = [
            scanned("webdataset", path, asdict(wanted), partial(scan_shard, path, wanted)) for path in paths
        ]
        episodes = read_each(_episodes(paths, scans), _sound, on_error)
        first = scans[episodes[0].parts[0][0]]
        episodes = read_each(episodes, lambda each: _alike(each, first, scans), on_error)
        parts = [(shard, rows) for episode in episodes for shard, rows in episode.parts if len(rows)]
        lengths = np.array([sum(len(rows) for _, rows in episode.parts) for episode in episodes])
        shard_of_row = np.concatenate([np.full(len(rows), shard) for shard, rows in parts])

        def joined(name: str) -> np.ndarray:
            return np.concatenate([scans[shard][name][rows] for shard, rows in parts])

        pictures = _pictures(root, pictures, _cameras(first), described)
        columns: dict[str, Column] = {
            camera: EncodedColumn(paths, shard_of_row, joined(f"places/{stem}"))
            for camera, stem in pictures.items()
        }
        texts = np.concatenate(
            [scans[shard]["prompts"][scans[shard]["prompt_of_row"][rows]] for shard, rows in parts]
        )
        prompts, prompt_of_row = np.unique(texts, return_inverse=True)
        states, actions = joined("states"), joined("actions")
        sizes = {
            camera: next(iter(column.read(np.array([0])))).shape[:2] for camera, column in columns.items()
        }
        spec = RobotSpec(
            name=robot or (described.name if described else "unknown"),
            cameras=tuple(Camera(camera, *size) for camera, size in sizes.items()),
            state=_dims(described.state if described else (), "state", states.shape[1]),
            action=_dims(described.action if described else (), "action", actions.shape[1]),
            control_hz=control_hz or (described.control_hz if described else 10.0),
        )
        super().__init__(
            Episodes(
                root=root,
                spec=spec,
                lengths=lengths,
                states=states,
                actions=actions,
                prompts=prompts.tolist(),
                prompt_of_row=prompt_of_row.reshape(-1),
                columns=columns,
                files=paths,
                places=[episode.place for episode in episodes],
                provenance={"format": "webdataset"},
                names=(" + ".join(state), " + ".join(action)),
            ),
            cameras=cameras,
            image_size=image_size,
            cache=cache,
            cache_dir=cache_dir,
            described=[pictures, asdict(wanted)],
            on_error=on_error,
        )


def _shards(root: Path, files: str) -> list[Path]:
    if root.is_file():
        return [root]
    found = sorted(root.glob(files), key=natural) if root.is_dir() else []
    if not found:
        names = sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else []
        raise LibrobotError(
            f"{root}: expected tar shards {files!r}, found {', '.join(names) or 'nothing'}; set "
            "data.source.files"
        )
    return found


def _has_state(path: Path, described: RobotSpec | None) -> bool:
    if described is not None:
        return described.state_dim > 0
    import tarfile

    try:
        with tarfile.open(path, "r:") as tar:
            stem = None
            for member in tar:
                name = member.name.rpartition("/")[2]
                key, _, suffix = name.partition(".")
                if stem is not None and key != stem:
                    return False
                if suffix == "state.npy":
                    return True
                stem = key
    except tarfile.ReadError:
        pass  # scanning says so, with what is wrong
    return False


def _episodes(paths: Sequence[Path], scans: Sequence[Mapping[str, np.ndarray]]) -> list[ShardEpisode]:
    """In order; an episode that the last one of a shard goes on with is one with it."""
    found: list[ShardEpisode] = []
    for shard, (path, scan) in enumerate(zip(paths, scans, strict=True)):
        ends = np.cumsum(scan["lengths"])
        names = [str(name) for name in scan["episodes"]]
        for i, name in enumerate(names):
            goes_on = i == 0 and found and found[-1].name == name
            if not goes_on:
                found.append(ShardEpisode(name, f"{path}: {name}"))
            found[-1].parts.append((shard, np.arange(ends[i] - scan["lengths"][i], ends[i])))
            found[-1].problem = found[-1].problem or str(scan["problems"][i])
        if broken := str(scan["broken"]):
            if not names:
                found.append(ShardEpisode("", str(path)))
            found[-1].problem = f"{broken}; it ends in episode {names[-1]}" if names else broken
    for episode in found:
        steps = np.concatenate(
            [scans[shard]["steps"][rows] for shard, rows in episode.parts] or [np.zeros(0)]
        )
        if not episode.problem and (np.diff(steps) != 1).any():
            before = int(steps[np.argmax(np.diff(steps) != 1)])
            episode.problem = f"{episode.place}: step {before + 1} is missing"
    seen: set[str] = set()
    for episode in found:
        if not episode.problem and episode.name in seen:
            episode.problem = f"{episode.place}: an earlier shard has this episode already"
        seen.add(episode.name)
    return found


def _sound(episode: ShardEpisode) -> ShardEpisode:
    if episode.problem:
        raise LibrobotError(episode.problem)
    return episode


def _cameras(scan: Mapping[str, np.ndarray]) -> list[str]:
    return [key.removeprefix("places/") for key in scan if key.startswith("places/")]


def _alike(
    episode: ShardEpisode, first: Mapping[str, np.ndarray], scans: Sequence[Mapping[str, np.ndarray]]
) -> ShardEpisode:
    for shard in [shard for shard, rows in episode.parts if len(rows)]:
        for what, expected, found in (
            ("state", first["states"].shape[1], scans[shard]["states"].shape[1]),
            ("action", first["actions"].shape[1], scans[shard]["actions"].shape[1]),
            ("cameras", _cameras(first), _cameras(scans[shard])),
        ):
            if expected != found:
                raise LibrobotError(
                    f"{episode.place}: {what}: expected {expected} as in the first shard, found {found}"
                )
    return episode


def _pictures(
    root: Path, wanted: Mapping[str, str] | None, found: Sequence[str], described: RobotSpec | None
) -> dict[str, str]:
    """Camera -> the stem of its members."""
    if wanted is None:
        order = [name for name in described.camera_names if name in found] if described else []
        return {name: name for name in [*order, *(name for name in found if name not in order)]}
    stems = {camera: picture_name(member) or member for camera, member in wanted.items()}
    for camera, stem in stems.items():
        if stem not in found:
            raise LibrobotError(
                f"{root}: data.source.pictures: {camera}: no pictures {stem!r}; {nearest(stem, found)}"
            )
    return stems


def _dims(described: tuple[Dim, ...], name: str, size: int) -> tuple[Dim, ...]:
    if len(described) == size:
        return described
    return tuple(Dim(f"{name}_{i}") for i in range(size))
