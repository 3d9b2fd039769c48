"""Controls: what the same checkpoint does when pictures or words are taken away.

Both run the scenes of the main evaluation; success is judged by the scene's true task. A policy that needs
its inputs fails them; one that has memorised a motion does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from librobot.errors import LibrobotError
from librobot.evaluation.episode import Episode, EpisodeResult

Transform = Callable[[dict[str, Any], Episode], dict[str, Any]]
CONTROLS = ("blank_images", "shuffled_prompts")
GREY = 128


def blank_images(observation: dict[str, Any], episode: Episode) -> dict[str, Any]:
    """The observation with every image of every camera an even grey of the same size."""
    images = {camera: np.full_like(image, GREY) for camera, image in observation["images"].items()}
    return {**observation, "images": images}


def shuffled_prompts(episodes: Sequence[EpisodeResult], *, seed: int = 0) -> Transform:
    """A transform that gives each episode the instruction of another one, of different text.

    `episodes` are the main run's, whose instructions are permuted (`derangement`).
    """
    prompts = [episode.prompt for episode in episodes]
    order = derangement(prompts, seed=seed)
    given = {episodes[i].index: prompts[j] for i, j in enumerate(order)}
    return lambda observation, episode: {**observation, "prompt": given[episode.index]}


def derangement(labels: Sequence[str], *, seed: int = 0) -> list[int]:
    """A random permutation under which no element's label stays the same.

    The indices are laid out by label, labels and members in random order, and rotated by the size of the
    largest group: each element then meets one of another group. Raises LibrobotError where one label is on
    more than half of the elements, so that no such permutation exists.
    """
    random = np.random.default_rng(seed)
    groups: dict[str, list[int]] = {}
    for index in random.permutation(len(labels)).tolist():
        groups.setdefault(labels[index], []).append(index)
    largest = max((len(group) for group in groups.values()), default=0)
    if 2 * largest > len(labels):
        most = max(groups, key=lambda label: len(groups[label]), default="")
        raise LibrobotError(
            f"instructions cannot be shuffled: {most!r} is that of {largest} of {len(labels)} episodes, so "
            "some would keep their own; evaluate more kinds of task, or leave this control out"
        )
    layout = [index for group in groups.values() for index in group]
    order = [0] * len(labels)
    for place, index in enumerate(layout):
        order[index] = layout[(place + largest) % len(layout)]
    return order
