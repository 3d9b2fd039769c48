"""Randomness in training is a function of the seed, the batch's number and the rank.

So a resumed run draws what an uninterrupted one would have drawn, on any number of devices, and validation in
between changes nothing. Torch's generators are seeded, since dropout draws from them.
"""

from __future__ import annotations

import hashlib

import torch
from lightning import Trainer


def step_seed(seed: int, batch: int, rank: int) -> int:
    """A well-mixed 63-bit seed for one batch on one rank."""
    digest = hashlib.blake2b(f"{seed}/{batch}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_step(seed: int, trainer: Trainer) -> None:
    """Seed torch for the batch that comes next. The count of batches is part of Lightning's checkpoint."""
    batch = trainer.fit_loop.epoch_loop.batch_progress.total.ready
    torch.manual_seed(step_seed(seed, batch, trainer.global_rank))
