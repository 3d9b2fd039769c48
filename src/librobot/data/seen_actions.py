"""Chunks of a dataset's actions as a policy sees them, and their statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from librobot.data.sources.base import Mixture, Source
from librobot.data.statistics import vector_statistics
from librobot.data.strided import strides_of
from librobot.data.windows import Windows
from librobot.representation import Representation

MOST_NUMBERS = 40_000_000
"""Of all chunks together, more than which statistics take evenly spread ones: about 300 MB in float64."""
BLOCK = 8192


def seen_chunks(
    source: Source, windows: Windows, samples: Int[np.ndarray, " n"], seen: Representation | None
) -> Float[torch.Tensor, "n k a"]:
    """The chunks of `samples`, in physical units."""
    rows, _ = windows.action_rows(samples)
    actions = torch.from_numpy(source.actions(rows.reshape(-1))).unflatten(0, rows.shape)
    if seen is None:
        return actions
    current = windows.rows[samples]
    robot = torch.from_numpy(source.embodiment(current)) if isinstance(source, Mixture) else None
    return seen.encode(actions, torch.from_numpy(source.states(current)), robot)


def seen_statistics(source: Source, seen: Representation, options: Mapping[str, int]) -> Any:
    """`Source.statistics` with the actions as the policy sees them: of all chunks of all frames, without what
    lies past an episode's end. Dimensions that stay as they are keep the dataset's own statistics. `options`
    are those of `Windows`. "action_by_step" are (k, o): those of each step of a chunk by itself.
    """
    own = source.statistics()
    each: list[dict[str, dict[str, np.ndarray]]] = list(own) if isinstance(own, list) else [own]
    lengths = source.episode_lengths
    windows = Windows(lengths, range(len(lengths)), strides=strides_of(source), **options)
    robots = source.embodiment(windows.rows) if isinstance(source, Mixture) else np.zeros(len(windows), int)
    statistics = [
        {
            "state": each[robot]["state"],
            **_actions(source, windows, np.flatnonzero(robots == robot), seen, robot, each[robot]),
        }
        for robot in range(len(each))
    ]
    return statistics if isinstance(own, list) else statistics[0]


def _actions(
    source: Source,
    windows: Windows,
    samples: Int[np.ndarray, " n"],
    seen: Representation,
    robot: int,
    own: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, dict[str, np.ndarray]]:
    width = (seen.embodiments or (seen.spec,))[robot].action_dim
    most = max(1, MOST_NUMBERS // (windows.horizon * width))
    if len(samples) > most:
        samples = samples[np.linspace(0, len(samples) - 1, most).round().astype(np.int64)]
    parts, masks = [], []
    for begin in range(0, len(samples), BLOCK):
        block = samples[begin : begin + BLOCK]
        masks.append(windows.action_rows(block)[1])
        parts.append(seen_chunks(source, windows, block, seen).numpy()[..., :width])
    chunks, real = np.concatenate(parts), np.concatenate(masks)
    whole = vector_statistics(chunks[real])
    steps = [vector_statistics(chunks[real[:, 0], 0])]
    for i in range(1, windows.horizon):  # one that no episode is long enough for has the last one's
        steps.append(vector_statistics(chunks[real[:, i], i]) if real[:, i].any() else steps[-1])
    by_step = {name: np.stack([step[name] for step in steps]) for name in whole}
    for there, here in seen.untouched(robot):
        for name in whole:
            whole[name][there] = by_step[name][:, there] = own["action"][name][here]
    return {"action": whole, "action_by_step": by_step}


def robots_of(source: Source, seen: Representation | None) -> Sequence[Any]:
    """The robots of a mixture, or the one, as the policy sees them."""
    if seen is not None:
        return seen.embodiments or (seen.spec,)
    return source.embodiments if isinstance(source, Mixture) else (source.spec,)
