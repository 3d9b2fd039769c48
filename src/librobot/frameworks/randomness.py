"""Randomness in training is a function of the seed, the batch's number and the rank.

So a resumed run draws what an uninterrupted one would have drawn, on any number of devices, and validation in
between changes nothing. Torch's generators are seeded, since dropout draws from them.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from lightning import Trainer

from librobot.replicas import Part


def step_seed(seed: int, batch: int, rank: int) -> int:
    """A well-mixed 63-bit seed for one batch on one rank."""
    digest = hashlib.blake2b(f"{seed}/{batch}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def begin_batch(seed: int, trainer: Trainer) -> Part:
    """Seed torch for the batch that comes next, and say which part of it this process has. The count of
    batches is part of Lightning's checkpoint.

    Processes that share their samples (tensor parallelism) share the seed.
    """
    batch = trainer.fit_loop.epoch_loop.batch_progress.total.ready
    place: Any = getattr(trainer.strategy, "distributed_sampler_kwargs", None)
    rank, count = (place["rank"], place["num_replicas"]) if place else (0, 1)
    mesh = getattr(trainer.lightning_module, "device_mesh", None)
    torch.manual_seed(step_seed(seed, batch, rank))
    return Part(rank, count, step_seed(seed, batch, -1), None if mesh is None else mesh["data"].get_group())


def is_logged(trainer: Trainer) -> bool:
    """Whether what this step gives goes to the loggers."""
    return (trainer.global_step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
