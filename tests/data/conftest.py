"""Small datasets and sources shared by the tests of the data room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic import ArraySource, make_episode

from librobot.data.writer import LeRobotWriter
from librobot.types import Camera, Dim, RobotSpec


@pytest.fixture(scope="session")
def spec() -> RobotSpec:
    return RobotSpec(
        "arm",
        (Camera("front", 32, 48), Camera("wrist", 24, 24)),
        (*(Dim(f"joint_{i}", "rad", "joint") for i in range(3)), Dim("gripper", low=0.0, high=1.0)),
        (Dim("x", "m", "ee_position", "delta"), Dim("gripper", kind="gripper")),
        10.0,
    )


@pytest.fixture(scope="session")
def episodes(spec: RobotSpec) -> list[dict[str, Any]]:
    return [make_episode(spec, index, length) for index, length in enumerate((5, 1, 8, 6))]


@pytest.fixture(scope="session")
def image_dataset(
    spec: RobotSpec, episodes: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Read only: tests that damage it take `damaged`."""
    root = tmp_path_factory.mktemp("image_dataset")
    metadata = {"renderer": "mujoco-rays", "env": {"name": "toy"}}
    with LeRobotWriter(root, spec, fps=10, metadata=metadata) as writer:
        for episode in episodes:
            writer.add_episode(**episode)
    return root


@pytest.fixture(scope="session")
def video_dataset(
    spec: RobotSpec, episodes: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("video_dataset")
    with LeRobotWriter(root, spec, fps=10, image_format="video") as writer:
        for episode in episodes:
            writer.add_episode(**episode)
    return root


@pytest.fixture
def array_source(spec: RobotSpec) -> Callable[[list[int]], ArraySource]:
    return lambda lengths: ArraySource(lengths, spec)
