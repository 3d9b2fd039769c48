"""Episodes and sources made up for the tests of the data room; every frame tells which it is."""

from __future__ import annotations

from typing import Any

import numpy as np

from librobot.data.statistics import vector_statistics
from librobot.types import RobotSpec

TASKS = ("pick the red cube", "open the drawer", "press the button")


def make_episode(spec: RobotSpec, index: int, length: int) -> dict[str, Any]:
    """An episode whose content tells which it is: every frame of every episode differs."""
    generator = np.random.default_rng([7, index])
    images = {}
    for number, camera in enumerate(spec.cameras):
        rows, columns = np.mgrid[: camera.height, : camera.width]
        frames = [
            np.stack([columns * 3 + frame * 5, rows * 2 + index * 11, (rows + columns) * 2 + number * 40], -1)
            for frame in range(length)
        ]
        images[camera.name] = np.stack(frames).astype(np.uint8)
    return {
        "images": images,
        "state": generator.normal(size=(length, spec.state_dim)).astype(np.float32),
        "action": generator.normal(size=(length, spec.action_dim)).astype(np.float32),
        "task": TASKS[index % len(TASKS)],
    }


class ArraySource:
    """A source in memory: the state's first value is the row, the image's value is the row modulo 256."""

    def __init__(self, lengths: list[int], spec: RobotSpec) -> None:
        self.spec = spec
        self.episode_lengths = np.array(lengths, dtype=np.int64)
        self.provenance: dict[str, Any] = {"root": "memory"}

    def states(self, rows: np.ndarray) -> np.ndarray:
        return np.repeat(rows[:, None], self.spec.state_dim, 1).astype(np.float32)

    def actions(self, rows: np.ndarray) -> np.ndarray:
        return np.repeat(rows[:, None], self.spec.action_dim, 1).astype(np.float32) + 0.5

    def images(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {
            camera.name: np.broadcast_to(
                (rows % 256).astype(np.uint8)[:, None, None, None],
                (len(rows), 3, camera.height, camera.width),
            ).copy()
            for camera in self.spec.cameras
        }

    def prompts(self, rows: np.ndarray) -> list[str]:
        return [f"task {row}" for row in rows]

    def statistics(self) -> dict[str, dict[str, np.ndarray]]:
        rows = np.arange(self.episode_lengths.sum())
        return {
            "state": vector_statistics(self.states(rows)),
            "action": vector_statistics(self.actions(rows)),
        }
