"""What a training process on a CPU has beside its tensors, and what its data workers have."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from librobot.errors import LibrobotError

AHEAD = 1
"""Batches that Lightning fetches beside the one that a step computes with."""


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes: of the training process `runtime` (interpreter, libraries, threads), `tensors` at their peak and
    `ahead` (batches that wait in it); of all its data workers together `workers` (batches that they prepare).
    """

    runtime: float
    tensors: float
    ahead: float
    workers: float
    num_workers: int

    @property
    def total(self) -> float:
        """The most that is resident of the training process."""
        return self.runtime + self.tensors + self.ahead


def process_memory(cfg: DictConfig, tensors: float, batch: float) -> ProcessMemory:
    """Of a run of `cfg` whose tensors take `tensors` bytes at their peak, `batch` of them a batch."""
    workers, each = int(cfg.data.get("num_workers") or 0), int(cfg.data.get("prefetch_factor") or 1)
    return ProcessMemory(runtime(cfg), tensors, AHEAD * batch, workers * each * batch, workers)


def runtime(cfg: DictConfig) -> int:
    """Resident bytes of a process without a policy: measured, because versions and machines differ."""
    module = "librobot.training.estimates.runtime"
    command = [sys.executable, "-m", module, *sorted(set(targets(OmegaConf.to_container(cfg))))]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return int(done.stdout.split()[-1])
    except (ValueError, IndexError) as error:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LibrobotError(
            f"the memory of an empty training process could not be measured: {last}"
        ) from error


def targets(node: Any) -> Iterator[str]:
    """All classes and functions that a configuration names."""
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)
