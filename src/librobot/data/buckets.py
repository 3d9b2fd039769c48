"""Batches of samples of like length: what a batch pads is the difference to its longest."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Int


class LengthBuckets:
    """An order of samples, rearranged inside stretches of `window` batches: sorted by length, cut into
    batches, the batches shuffled. From (seed, epoch) alone, so that a resumed run goes on exactly.

    order: epoch -> sample indices. lengths: of each sample, the parts that are padded by themselves (the
    prompt, the answer); the first sorts first. batch: of all devices together.
    """

    def __init__(
        self,
        order: Callable[[int], Int[np.ndarray, " n"]],
        lengths: Int[np.ndarray, "n p"],
        *,
        batch: int,
        window: int,
        seed: int,
    ) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1 batch, found {window}")
        self.order, self.lengths, self.batch, self.window, self.seed = order, lengths, batch, window, seed

    def indices(self, epoch: int) -> Int[np.ndarray, " n"]:
        """The samples of `epoch`, in order; those beyond the last whole batch stay at its end."""
        samples = self.order(epoch)
        random = np.random.default_rng([self.seed, epoch])
        whole = len(samples) // self.batch * self.batch
        stretch = self.batch * self.window
        parts = []
        for start in range(0, whole, stretch):
            part = samples[start : min(start + stretch, whole)]
            by_length = part[np.lexsort(self.lengths[part].T[::-1])].reshape(-1, self.batch)
            parts.append(random.permutation(by_length).reshape(-1))
        return np.concatenate([*parts, samples[whole:]])


def padding(lengths: Int[np.ndarray, "n p"], samples: Int[np.ndarray, " n"], batch: int) -> float:
    """The share of padding in whole batches, each part of a sample padded to its longest in the batch."""
    batches = lengths[samples[: len(samples) // batch * batch]].reshape(-1, batch, lengths.shape[1])
    longest = batches.max(axis=1)
    return 1.0 - float(batches.sum()) / float(longest.sum() * batch)
