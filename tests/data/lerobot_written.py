"""Datasets that lerobot itself writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

JOINTS = tuple(f"joint_{i}.pos" for i in range(6))
TASKS = ("pick the cube", "open the drawer")


def write_with_lerobot(
    root: Path,
    height: int,
    width: int,
    lengths: Sequence[int],
    *,
    video: bool,
    state: Sequence[str] = JOINTS,
    action: Sequence[str] = JOINTS,
) -> Path:
    """Episodes of these lengths at 30 Hz, with the TASKS in turn and two cameras. Every frame differs."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    image = {
        "dtype": "video" if video else "image",
        "shape": (height, width, 3),
        "names": ["height", "width", "channels"],
    }
    features = {
        "observation.images.top": image,
        "observation.images.side_cam": dict(image),
        "observation.state": {"dtype": "float32", "shape": (len(state),), "names": list(state)},
        "action": {"dtype": "float32", "shape": (len(action),), "names": list(action)},
    }
    dataset = LeRobotDataset.create(
        "somebody/something",
        fps=30,
        features=features,
        root=root,
        robot_type="so100_follower",
        use_videos=video,
    )
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    for episode, length in enumerate(lengths):
        for frame in range(length):
            picture = np.stack([columns + 9 * frame, rows + 25 * episode, rows + columns], -1)
            picture = picture.astype(np.uint8)
            dataset.add_frame(
                {
                    "observation.images.top": picture,
                    "observation.images.side_cam": np.ascontiguousarray(picture[::-1]),
                    "observation.state": generator.normal(size=len(state)).astype(np.float32),
                    "action": generator.normal(3.0, 2.0, size=len(action)).astype(np.float32),
                    "task": TASKS[episode % len(TASKS)],
                }
            )
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()
    return root
