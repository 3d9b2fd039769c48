"""What is wrong with a dataset's grippers: out of range, at rest, or the other way round than the state's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from librobot.types import Dim

OPPOSED = -0.5
"""A correlation of actions with the states that follow below this means opposite signs."""
USUAL = 0.95
"""Where so many values lie in [0, 1], or in [-1, 1], the others are mistakes."""


def out_of_range(dim: Dim, values: Float[np.ndarray, " n"]) -> str | None:
    """Beyond the spec's limits; without them, beyond [0, 1] or [-1, 1] where nearly all values lie in it."""
    low, high = dim.low, dim.high
    if not (np.isfinite(low) and np.isfinite(high)):
        low, high = (0.0 if np.quantile(values, 1 - USUAL) >= 0 else -1.0), 1.0
        if ((low <= values) & (values <= high)).mean() < USUAL:
            return None
    slack = 1e-3 * (high - low)
    if values.min() >= low - slack and values.max() <= high + slack:
        return None
    return f"goes from {values.min():g} to {values.max():g}, expected values in [{low:g}, {high:g}]"


def at_rest(values: Float[np.ndarray, " n"], owner: Int[np.ndarray, " n"]) -> list[int]:
    """The episodes in which it never moves, where it does in most of the others."""
    resting = [int(e) for e in np.unique(owner) if not np.ptp(values[owner == e])]
    return resting if 0 < len(resting) < len(np.unique(owner)) / 2 else []


def inverted(
    action: Float[np.ndarray, " n"], state: Float[np.ndarray, " n"], owner: Int[np.ndarray, " n"]
) -> tuple[list[int], int]:
    """The episodes whose actions open when the states that follow close, and how many could be judged."""
    opposed, judged = [], 0
    for episode in np.unique(owner):
        own = owner == episode
        commanded, reached = action[own][:-1].astype(np.float64), state[own][1:].astype(np.float64)
        if len(reached) < 4 or not np.ptp(commanded) or not np.ptp(reached):
            continue
        judged += 1
        if np.corrcoef(commanded, reached)[0, 1] < OPPOSED:
            opposed.append(int(episode))
    return opposed, judged


def gripper_problems(
    states: Float[np.ndarray, "n s"],
    actions: Float[np.ndarray, "n a"],
    dims: tuple[tuple[Dim, ...], tuple[Dim, ...]],
    owner: Int[np.ndarray, " n"],
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(where, what, episodes) of each. `dims` are those of state and action, `owner` each row's episode."""
    for key, values, own in (("state", states, dims[0]), ("action", actions, dims[1])):
        for i, dim in enumerate(own):
            if dim.kind != "gripper":
                continue
            if what := out_of_range(dim, values[:, i]):
                yield f"{key} {dim.name!r}", what, ()
            if key == "action" and (resting := at_rest(values[:, i], owner)):
                yield (
                    f"action {dim.name!r}, episode {resting[0]}",
                    f"never moves, as in {len(resting)} of {len(np.unique(owner))} episodes",
                    tuple(resting),
                )
    pairs = _pairs(*dims)
    for s, a in pairs:
        opposed, judged = inverted(actions[:, a], states[:, s], owner)
        if opposed:
            yield (
                f"action {dims[1][a].name!r}, episode {opposed[0]}",
                f"opens when state {dims[0][s].name!r} closes, in {len(opposed)} of the {judged} episodes in "
                f"which both move: one of them is inverted",
                tuple(opposed),
            )


def _pairs(state: tuple[Dim, ...], action: tuple[Dim, ...]) -> list[tuple[int, int]]:
    """The gripper's state of each gripper's action: of the same name, or the only one."""
    states = [i for i, dim in enumerate(state) if dim.kind == "gripper"]
    actions = [i for i, dim in enumerate(action) if dim.kind == "gripper" and dim.mode == "absolute"]
    named = {state[i].name: i for i in states}
    if len(states) == len(actions) == 1:
        return [(states[0], actions[0])]
    return [(named[action[i].name], i) for i in actions if action[i].name in named]
