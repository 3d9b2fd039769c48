"""The plain records that an evaluation makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8

from librobot.errors import LibrobotError, nearest
from librobot.sim.base import DEMONSTRATION_SEEDS, EVALUATION_SEEDS, Suite

SEED_STRIDE = 100_000  # scenes set aside for each value of `seed`


@dataclass(frozen=True)
class Episode:
    """One episode to run: its place in the evaluation, its kind and the seed of its scene."""

    index: int
    kind: str
    seed: int


@dataclass
class EpisodeResult:
    """One finished episode. `length` counts control steps; `frames` are kept for recorded episodes only."""

    index: int
    kind: str
    seed: int
    prompt: str
    success: bool
    length: int
    frames: list[UInt8[np.ndarray, "h w 3"]] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class PolicyCall:
    """One call of `Policy.infer_batch`."""

    batch_size: int
    seconds: float


def plan(suite: Suite, episodes: int, *, seed: int = 0, kinds: Sequence[str] | None = None) -> list[Episode]:
    """The episodes of an evaluation: kinds take turns, scene seeds never seen in demonstrations.

    Every kind gets an equal share: `episodes` is rounded up to a multiple of their number. Raises
    LibrobotError for an unknown kind, and where `seed` leaves the range of evaluation seeds.
    """
    chosen = suite.kinds if kinds is None else tuple(kinds)
    if not chosen:
        raise LibrobotError(f"kinds: at least one is needed; valid names: {', '.join(suite.kinds)}")
    for kind in chosen:
        if kind not in suite.kinds:
            raise LibrobotError(f"suite {suite.name!r} has no kind {kind!r}; {nearest(kind, suite.kinds)}")
    if episodes < 1:
        raise LibrobotError(f"episodes must be at least 1, found {episodes}")
    count = math.ceil(episodes / len(chosen)) * len(chosen)
    first = EVALUATION_SEEDS.start + seed * SEED_STRIDE
    seeds = range(first, first + count)
    if count > SEED_STRIDE or seed < 0 or seeds.stop > EVALUATION_SEEDS.stop:
        most = len(EVALUATION_SEEDS) // SEED_STRIDE - 1
        raise LibrobotError(
            f"seed={seed}, episodes={count}: seed goes from 0 to {most} and episodes to {SEED_STRIDE}"
        )
    assert seeds.start >= DEMONSTRATION_SEEDS.stop, "evaluation scenes must not overlap the demonstrations'"
    return [Episode(i, chosen[i % len(chosen)], seeds[i]) for i in range(count)]
