"""MCAP and rosbag2: topics become cameras, state and action, at one control rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from librobot.data.sources.base import Cache, OnError
from librobot.data.sources.hdf5_files import natural
from librobot.data.sources.mcap_bags import Bag, BagReader, TopicTerm
from librobot.data.sources.mcap_files import McapColumn, McapFile, Wanted
from librobot.data.sources.stored import Column, Episodes, StoredSource, read_each
from librobot.errors import LibrobotError
from librobot.types import Camera, RobotSpec

STATE = "/joint_states"


class McapSource(StoredSource):
    """A .mcap file, a rosbag2 folder, or a folder of either; every bag is an episode. Files are read through
    once, and what they hold is kept in $LIBROBOT_CACHE/mcap; pictures are read from their chunks.

    action, state: terms side by side (see `TopicTerm`); state None: the positions of /joint_states, where
    that is. pictures: camera -> topic; None: every image topic, named after it. Steps are 1 / control_hz
    apart from when every topic has its first message to when the first has its last; at each, a topic's last
    message counts. max_age: by how many seconds it may be older, None for any. stamps: "log", when a message
    was recorded, or "header", when its header, if any, says that it was made. prompt: the
    instruction, None for the bag's name; prompt_topic, prompt_field: a topic with it instead.

    Raises LibrobotError, by file and topic, for topics and fields that are missing, messages of another
    shape, gaps longer than max_age, and files that were cut short.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        action: Sequence[Mapping[str, Any]],
        state: Sequence[Mapping[str, Any]] | None = None,
        pictures: Mapping[str, str] | None = None,
        prompt: str | None = None,
        prompt_topic: str | None = None,
        prompt_field: str = "data",
        control_hz: float = 10.0,
        max_age: float | None = 1.0,
        stamps: Literal["log", "header"] = "log",
        cameras: Sequence[str] | None = None,
        image_size: Sequence[int] | None = None,
        cache: Cache = "none",
        cache_dir: str | Path | None = None,
        robot: str = "unknown",
        on_error: OnError = "raise",
    ) -> None:
        if stamps not in ("log", "header"):
            raise ValueError(f"stamps must be log or header, found {stamps!r}")
        if control_hz <= 0 or (max_age is not None and max_age <= 0):
            raise ValueError(f"control_hz and max_age must be above 0, found {control_hz} and {max_age}")
        root = Path(root).expanduser().absolute()
        bags = _bags(root)
        if state is None or pictures is None:
            file = McapFile(bags[0][0])
            topics = {channel.topic for channel in file.channels.values()}
            state = ([{"topic": STATE}] if STATE in topics else []) if state is None else state
            pictures = _named(file.image_topics()) if pictures is None else pictures
        terms = [TopicTerm.parse(each, f"data.source.state[{i}]") for i, each in enumerate(state)]
        num_state = len(terms)
        terms += [TopicTerm.parse(each, f"data.source.action[{i}]") for i, each in enumerate(action)]
        if len(terms) == num_state:
            raise ValueError("action: expected at least one term, found none")
        wanted = Wanted(
            tuple(sorted(set(pictures.values()))),
            tuple(dict.fromkeys(term.key for term in terms)),
            ((prompt_topic, prompt_field),) if prompt_topic else (),
            stamps,
        )
        read = BagReader(wanted, terms, num_state, pictures, prompt, prompt_topic, control_hz, max_age)
        found = read_each(bags, read, on_error)
        first = found[0]
        found = read_each(found, partial(_alike, first), on_error)
        paths = [path for bag in found for path in bag.paths]
        starts = np.cumsum([0, *(len(bag.paths) for bag in found)])
        columns: dict[str, Column] = {}
        for camera, topic in pictures.items():
            file_of_row = [bag.pictures[camera][0] + start for bag, start in zip(found, starts, strict=False)]
            where = np.concatenate([bag.pictures[camera][1] for bag in found])
            columns[camera] = McapColumn(paths, topic, np.concatenate(file_of_row), where)
        sizes = {camera: next(iter(c.read(np.array([0])))).shape[:2] for camera, c in columns.items()}
        prompts, prompt_of_row = np.unique(
            [text for bag in found for text in bag.prompts], return_inverse=True
        )
        super().__init__(
            Episodes(
                root=root,
                spec=RobotSpec(
                    name=robot,
                    cameras=tuple(Camera(camera, *size) for camera, size in sizes.items()),
                    state=read.dims(first, 0, num_state),
                    action=read.dims(first, num_state, len(terms)),
                    control_hz=control_hz,
                ),
                lengths=np.array([len(bag.action) for bag in found]),
                states=np.concatenate([bag.state for bag in found]),
                actions=np.concatenate([bag.action for bag in found]),
                prompts=prompts.tolist(),
                prompt_of_row=prompt_of_row.reshape(-1),
                columns=columns,
                files=paths,
                places=[bag.place for bag in found],
                provenance={"format": "mcap"},
            ),
            cameras=cameras,
            image_size=image_size,
            cache=cache,
            cache_dir=cache_dir,
            described=[asdict(wanted), dict(pictures), [asdict(t) for t in terms], control_hz, max_age],
            on_error=on_error,
        )


def _bags(root: Path) -> list[list[Path]]:
    """The files of each bag: a rosbag2 folder (metadata.yaml) is one bag, whatever its number of files."""
    if root.is_file():
        return [[root]]
    own = sorted(root.glob("*.mcap"), key=natural)
    if (root / "metadata.yaml").exists() and own:
        return [own]
    folders = sorted((path for path in root.glob("*/") if any(path.glob("*.mcap"))), key=natural)
    below = [files for folder in folders for files in _bags(folder)]
    if not own and not below:
        found = sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else []
        raise LibrobotError(
            f"{root}: expected .mcap files or rosbag2 folders, found {', '.join(found) or 'nothing'}"
        )
    return [[path] for path in own] + below


def _named(topics: Sequence[str]) -> dict[str, str]:
    """A camera's name is its topic without what all ROS drivers put around it."""
    usual = ("image_raw", "image", "compressed", "image_rect", "image_rect_color", "color", "rgb")
    names = {}
    for topic in topics:
        words = [word for word in topic.strip("/").split("/") if word not in usual]
        name = "_".join(words) or topic.strip("/").replace("/", "_")
        names[name if name not in names else topic.strip("/").replace("/", "_")] = topic
    return names


def _alike(first: Bag, bag: Bag) -> Bag:
    for what, expected, found in (
        ("state", first.state.shape[1], bag.state.shape[1]),
        ("action", first.action.shape[1], bag.action.shape[1]),
        ("joints", first.names, bag.names),
    ):
        if expected != found:
            raise LibrobotError(
                f"{bag.place}: {what}: expected {expected} as in {first.place}, found {found}"
            )
    return bag
