"""Made-up episodes of any size, without a file: for tests, benches and dry runs of a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from librobot.data.sources.base import Cache, OnError
from librobot.data.sources.stored import Episodes, StoredSource, join_prompts
from librobot.types import Camera, Dim, RobotSpec

BLOCKS = 16
"""A picture is so many coarse blocks across, and fine noise over them: neither trivial nor pure noise."""


def synthetic(
    *,
    episodes: int = 16,
    length: Sequence[int] = (50, 100),
    state_dim: int = 7,
    action_dim: int = 7,
    views: Sequence[str] = ("front", "wrist"),
    height: int = 224,
    width: int = 224,
    prompts: Sequence[str] = ("pick up the red cube", "open the drawer"),
    control_hz: float = 10.0,
    seed: int = 0,
    cameras: Sequence[str] | None = None,
    image_size: Sequence[int] | None = None,
    cache: Cache = "none",
    on_error: OnError = "raise",
) -> StoredSource:
    """length: of an episode in frames, drawn from [shortest, longest]. States are smooth curves in about
    [-1, 1], each action is the state that follows (of as many dimensions as it has), the last dimension of
    both is a gripper of 0 or 1. The same arguments give the same numbers and pixels on every machine.

    Raises ValueError for sizes that are not positive.
    """
    shortest, longest = (int(limit) for limit in length) if len(length) == 2 else (0, 0)
    for name, value in (
        ("episodes", episodes),
        ("action_dim", action_dim),
        ("height", height),
        ("width", width),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}")
    if not 1 <= shortest <= longest:
        raise ValueError(f"length must be [shortest, longest] in frames, found {list(length)}")
    if state_dim < 0:
        raise ValueError(f"state_dim must be at least 0, found {state_dim}")
    if not prompts:
        raise ValueError("prompts must hold at least one instruction")
    random = np.random.default_rng([seed, 0])
    lengths = random.integers(shortest, longest + 1, episodes)
    spec = RobotSpec(
        name="synthetic",
        cameras=tuple(Camera(name, height, width) for name in views),
        state=_dims(state_dim),
        action=_dims(action_dim),
        control_hz=control_hz,
    )
    names, prompt_of_row = join_prompts([prompts[i % len(prompts)] for i in range(episodes)], lengths)
    curves = [_curve(int(n) + 1, max(state_dim, action_dim), seed, i) for i, n in enumerate(lengths)]
    described = [seed, episodes, shortest, longest, list(views), height, width]
    return StoredSource(
        Episodes(
            root=Path("synthetic"),
            spec=spec,
            lengths=lengths,
            states=_vectors([curve[:-1] for curve in curves], state_dim),
            actions=_vectors([curve[1:] for curve in curves], action_dim),
            prompts=names,
            prompt_of_row=prompt_of_row,
            columns={name: NoisePictures(seed, i, height, width) for i, name in enumerate(views)},
            files=[],
            places=["synthetic"] * episodes,
            provenance={"format": "synthetic"},
        ),
        cameras=cameras,
        image_size=image_size,
        cache=cache,
        described=described,
        on_error=on_error,
    )


class NoisePictures:
    """A camera whose frame `row` is drawn from (seed, camera, row) alone."""

    def __init__(self, seed: int, camera: int, height: int, width: int) -> None:
        self.seed, self.camera, self.height, self.width = seed, camera, height, width

    def read(self, rows: Int[np.ndarray, " n"]) -> list[UInt8[np.ndarray, "h w 3"]]:
        return [self._frame(int(row)) for row in rows]

    def _frame(self, row: int) -> UInt8[np.ndarray, "h w 3"]:
        random = np.random.default_rng([self.seed, 1 + self.camera, row])
        coarse = random.integers(0, 224, (BLOCKS, BLOCKS, 3), dtype=np.uint8)
        down, across = (np.arange(side) * BLOCKS // side for side in (self.height, self.width))
        return coarse[down[:, None], across] + random.integers(
            0, 32, (self.height, self.width, 1), dtype=np.uint8
        )


def _dims(count: int) -> tuple[Dim, ...]:
    joints = tuple(Dim(f"joint_{i}", "rad", "joint") for i in range(count - 1))
    return (*joints, Dim("gripper", "", "gripper", low=0, high=1)) if count else ()


def _curve(length: int, dims: int, seed: int, episode: int) -> Float[np.ndarray, "t dim"]:
    random = np.random.default_rng([seed, 0, episode])
    phase, speed = random.uniform(0, 2 * np.pi, dims), random.uniform(0.02, 0.1, dims)
    return np.sin(phase + speed * np.arange(length)[:, None])


def _vectors(curves: Sequence[np.ndarray], dims: int) -> Float[np.ndarray, "n dim"]:
    values: np.ndarray = np.concatenate(curves).astype(np.float32)
    gripper: Any = (values[:, -1:] > 0).astype(np.float32)
    return np.concatenate([values[:, : dims - 1], gripper], axis=1) if dims else values[:, :0]
