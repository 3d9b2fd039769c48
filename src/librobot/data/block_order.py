"""A random order of short runs of neighbouring frames, which share the decoding of their keyframe."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


class BlockOrder:
    """Sample indices, epoch after epoch, drawn from (seed, epoch) alone: every sample once.

    The samples of each episode are cut into blocks of `block_frames` from its first frame on; blocks come in
    random order, so that every batch holds `batch_size / block_frames` of them (batch_size should be a
    multiple, or some are split between two batches). What is left at the ends of episodes is put together
    into blocks of frames that are no neighbours, drawn anew in every epoch.

    episode_of_sample: which episode each sample is of, ascending.
    """

    def __init__(self, episode_of_sample: Int[np.ndarray, " n"], block_frames: int, *, seed: int) -> None:
        if block_frames < 1:
            raise ValueError(f"block_frames must be at least 1, found {block_frames}")
        self.block_frames, self.seed = block_frames, seed
        _, starts, lengths = np.unique(episode_of_sample, return_index=True, return_counts=True)
        offset = np.arange(len(episode_of_sample)) - np.repeat(starts, lengths)
        whole = offset < np.repeat(lengths // block_frames * block_frames, lengths)
        self.blocks = np.flatnonzero(whole).reshape(-1, block_frames)
        self.rest = np.flatnonzero(~whole)

    def indices(self, epoch: int) -> Int[np.ndarray, " n"]:
        """The samples of `epoch`, in order."""
        generator = np.random.default_rng([self.seed, epoch])
        rest = generator.permutation(self.rest)
        even = len(rest) // self.block_frames * self.block_frames
        blocks = np.concatenate([self.blocks, rest[:even].reshape(-1, self.block_frames)])
        return np.concatenate([generator.permutation(blocks).reshape(-1), rest[even:]])


def batch_spread(order: Int[np.ndarray, " n"], values: Float[np.ndarray, "n d"], batch_size: int) -> float:
    """How much the means of batches vary, as a multiple of what independent samples would give.

    1 is a perfect shuffle, `batch_size` an order in which each batch holds copies of one sample; in between,
    a batch is worth `batch_size / spread` independent samples (the design effect of sampling theory, Kish
    1965, section 5.4). values (n, d) of every sample, such as states: the mean over
    their dimensions is taken.
    """
    scaled = values.astype(np.float64)
    spread = scaled.std(axis=0)
    scaled = (scaled - scaled.mean(axis=0))[:, spread > 0] / spread[spread > 0]
    used = len(order) // batch_size * batch_size
    means = scaled[order[:used]].reshape(-1, batch_size, scaled.shape[1]).mean(axis=1)
    # Without replacement, means vary less than independent ones by (n - b) / (n - 1).
    finite = (len(order) - batch_size) / max(1, len(order) - 1)
    return float((means**2).mean() * batch_size / finite)
