"""An order of samples whose composition depends on the step: what a curriculum trains on, and when."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

Shares = Callable[[int], Float[np.ndarray, " g"]]
"""Step -> the share of each group, summing to 1."""


class StepOrder:
    """Sample indices, epoch after epoch, drawn from (seed, epoch) alone: a resumed run goes on exactly.

    Of every batch each group has its share at that batch's step, to less than one sample. A group's samples
    come in an order of their own, none twice before all came once; an epoch is as many samples as there are,
    and only the groups decide which. groups: each group's sample indices. batch: of all devices together, of
    which `accumulate` make a step, and what an epoch leaves over makes one more. batches: how many of them an
    epoch is trained on (None: all whole ones).
    """

    def __init__(
        self,
        groups: Sequence[Int[np.ndarray, " n"]],
        shares: Shares,
        *,
        seed: int,
        batch: int,
        accumulate: int = 1,
        batches: int | None = None,
    ) -> None:
        self.groups, self.shares, self.seed = [np.asarray(group) for group in groups], shares, seed
        self.batch, self.accumulate = batch, accumulate
        self.batches = len(self) // batch if batches is None else batches
        self._drawn: list[Int[np.ndarray, " g"]] = []  # of each epoch before, how many of each group

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups)

    def indices(self, epoch: int) -> Int[np.ndarray, " n"]:
        """The samples of `epoch`, in order."""
        owners = self._owners(epoch)
        while len(self._drawn) < epoch:
            earlier = self._owners(len(self._drawn))[: self.batches * self.batch]
            self._drawn.append(np.bincount(earlier, minlength=len(self.groups)))
        before = np.sum(self._drawn[:epoch], axis=0) if epoch else np.zeros(len(self.groups), np.int64)
        chosen = np.empty(len(owners), np.int64)
        for i, group in enumerate(self.groups):
            places = np.flatnonzero(owners == i)
            chosen[places] = self._running(i, group, int(before[i]), len(places))
        return chosen

    def _owners(self, epoch: int) -> Int[np.ndarray, " n"]:
        """The group of each place of an epoch."""
        random = np.random.default_rng([self.seed, epoch])
        first = epoch * -(-self.batches // self.accumulate)
        owners = []
        for number in range(-(-len(self) // self.batch)):
            size = min(self.batch, len(self) - number * self.batch)
            share = self.shares(first + number // self.accumulate)
            ticks = (np.arange(size) + random.random()) / size
            edges = np.cumsum(share)
            last = int(np.flatnonzero(share)[-1])  # rounding may leave a little above the last edge
            owners.append(random.permutation(np.minimum(np.searchsorted(edges, ticks, side="right"), last)))
        return np.concatenate(owners)

    def _running(self, number: int, group: np.ndarray, start: int, count: int) -> Int[np.ndarray, " n"]:
        """Samples `start` to `start + count` of a group's endless order."""
        parts = []
        while count:
            turn, offset = divmod(start, len(group))
            order = np.random.default_rng([self.seed, number, turn]).permutation(group)
            part = order[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)
