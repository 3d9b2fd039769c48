"""What the writers of all formats share: an episode that fits the robot, whole on disk or not at all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from librobot.data.files import remove_temporaries
from librobot.data.images import encode_jpeg, encode_png
from librobot.types import RobotSpec


@dataclass(frozen=True)
class Episode:
    """An episode to be written; vectors are float32, in physical units, and finite.

    tasks: the instruction of each frame.
    """

    images: dict[str, UInt8[np.ndarray, "T h w 3"]]
    state: Float[np.ndarray, "T s"]
    action: Float[np.ndarray, "T a"]
    tasks: list[str]

    def __len__(self) -> int:
        return len(self.action)

    @property
    def task(self) -> str:
        """The one instruction, for formats that hold one. Raises ValueError where it changes."""
        found = list(dict.fromkeys(self.tasks))
        if len(found) > 1:
            raise ValueError(
                f"has {len(found)} instructions ({found[0]!r}, {found[1]!r}, ...), and this format holds one "
                "for each episode"
            )
        return found[0]


def fitting(
    spec: RobotSpec,
    *,
    images: Mapping[str, np.ndarray],
    state: np.ndarray,
    action: np.ndarray,
    task: str | Sequence[str],
) -> Episode:
    """The episode, where it fits `spec`. task: one for the episode, or one for each frame.

    Raises ValueError for cameras, shapes, types and lengths that do not fit, and for values that are not
    finite.
    """
    for name in spec.camera_names:
        if name not in images:
            raise ValueError(f"images of camera {name!r} are missing; found {sorted(images)}")
    if unknown := sorted(set(images) - set(spec.camera_names)):
        raise ValueError(f"the spec names no camera {unknown[0]!r}; it has {list(spec.camera_names)}")
    length = len(action)
    if not length:
        raise ValueError("an episode needs at least one frame")
    frames = {camera.name: np.asarray(images[camera.name]) for camera in spec.cameras}
    for camera in spec.cameras:
        found, expected = frames[camera.name], (length, camera.height, camera.width, 3)
        if found.shape != expected:
            raise ValueError(f"camera {camera.name!r}: expected shape {expected}, found {found.shape}")
        if found.dtype != np.uint8:
            raise ValueError(f"camera {camera.name!r}: expected uint8 pixels, found {found.dtype}")
    vectors = {
        "state": np.asarray(state if spec.state_dim else np.zeros((length, 0)), np.float32),
        "action": np.asarray(action, np.float32),
    }
    for name, size in (("state", spec.state_dim), ("action", spec.action_dim)):
        if vectors[name].shape != (length, size):
            raise ValueError(f"{name}: expected shape {(length, size)}, found {vectors[name].shape}")
        if not np.isfinite(vectors[name]).all():
            frame = int(np.argwhere(~np.isfinite(vectors[name]))[0, 0])
            raise ValueError(f"{name}: frame {frame} is not finite")
    tasks = [task] * length if isinstance(task, str) else list(task)
    if len(tasks) != length:
        raise ValueError(f"task: expected one instruction, or one for each of {length}, found {len(tasks)}")
    return Episode(frames, vectors["state"], vectors["action"], tasks)


class EpisodeWriter(ABC):
    """Writes a dataset into the folder `root`, and goes on with the whole episodes that are there.

    jpeg: the quality (1 to 100) of pictures as JPEG; None keeps every pixel.
    """

    one_instruction = False
    """Whether the format holds one instruction for each episode, rather than one for each frame."""

    def __init__(self, root: Path, spec: RobotSpec, *, jpeg: int | None = None) -> None:
        if jpeg is not None and not 1 <= jpeg <= 100:
            raise ValueError(f"jpeg: expected a quality from 1 to 100, found {jpeg}")
        self.root, self.spec, self.jpeg = root, spec, jpeg
        root.mkdir(parents=True, exist_ok=True)
        remove_temporaries(root)

    @property
    @abstractmethod
    def num_episodes(self) -> int:
        """Whole episodes on disk."""

    def add_episode(
        self,
        *,
        images: Mapping[str, UInt8[np.ndarray, "T h w 3"]],
        state: Float[np.ndarray, "T s"],
        action: Float[np.ndarray, "T a"],
        task: str | Sequence[str],
    ) -> None:
        """Store one episode; it is on disk, whole, when this returns. Raises ValueError; see `fitting`."""
        self.store(fitting(self.spec, images=images, state=state, action=action, task=task))

    def encoded(self, image: UInt8[np.ndarray, "h w 3"]) -> bytes:
        """PNG or JPEG."""
        return encode_png(image) if self.jpeg is None else encode_jpeg(image, self.jpeg)

    @abstractmethod
    def store(self, episode: Episode) -> None:
        """Put a fitting episode on disk."""

    def finalize(self) -> None:  # noqa: B027
        """What remains to be done after the last episode; for most formats, nothing."""
