"""Which samples an epoch of a mixture holds: every dataset with its share, none of them twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from librobot.errors import LibrobotError, nearest


class MixtureOrder:
    """Sample indices, epoch after epoch, drawn from (seed, epoch) alone.

    An epoch is the longest stretch in which no sample comes twice: it ends when the dataset that is used up
    first is used up, `len(order) = min(size / share)`. Larger datasets go on in the next epoch where they
    were: their permutation is cut into as many whole parts as fit into it, and drawn anew after the last one.

    groups: each dataset's sample indices. shares: of each, summing to 1. names: for errors.
    """

    def __init__(
        self,
        groups: Sequence[Int[np.ndarray, " n"]],
        shares: Float[np.ndarray, " d"],
        *,
        seed: int,
        names: Sequence[str],
    ) -> None:
        self.groups, self.seed = [np.asarray(group) for group in groups], seed
        sizes = np.array([len(group) for group in self.groups])
        if not sizes.all():
            empty = names[int(np.argmin(sizes))]
            raise LibrobotError(f"dataset {empty!r} of the mixture has no samples to train on; leave it out")
        total = max(1, int(np.floor((sizes / shares).min() + 1e-9)))
        exact = shares * total
        counts = np.floor(exact + 1e-9).astype(np.int64)
        counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
        self.counts: Int[np.ndarray, " d"] = np.minimum(counts, sizes)
        if not self.counts.all():
            rare = names[int(np.argmin(self.counts))]
            first = names[int(np.argmin(sizes / shares))]
            raise LibrobotError(
                f"dataset {rare!r} would give less than one sample to an epoch of {total}, which ends when "
                f"{first!r} is used up; raise its weight or lower that of {first!r}"
            )

    def __len__(self) -> int:
        return int(self.counts.sum())

    def indices(self, epoch: int) -> Int[np.ndarray, " n"]:
        """The samples of `epoch`, in order."""
        parts = []
        for i, (group, count) in enumerate(zip(self.groups, self.counts, strict=True)):
            whole = len(group) // count
            turn, part = divmod(epoch, whole)
            order = np.random.default_rng([self.seed, i, turn]).permutation(group)
            parts.append(order[part * count : (part + 1) * count])
        return np.random.default_rng([self.seed, epoch]).permutation(np.concatenate(parts))


def shares_of(
    names: Sequence[str], sizes: Sequence[int], weights: Mapping[str, float] | None, temperature: float
) -> Float[np.ndarray, " d"]:
    """weight ** (1 / temperature), summing to 1; without weights the sizes are taken.

    temperature 1 keeps the weights, larger ones even them out. Raises ValueError for weights of other
    datasets, missing ones, and values that are not above 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, found {temperature}")
    given = dict(zip(names, sizes, strict=True)) if weights is None else dict(weights)
    for name in given:
        if name not in names:
            raise ValueError(f"weights.{name}: {nearest(name, names)}")
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"weights: none given for {', '.join(missing)}; give every dataset one, or null")
    values = np.array([float(given[name]) for name in names])
    if not (values > 0).all():
        raise ValueError(f"weights must be above 0, found {dict(zip(names, values.tolist(), strict=True))}")
    scaled = np.exp(np.log(values) / temperature)
    return scaled / scaled.sum()
