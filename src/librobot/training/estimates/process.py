"""What a training process on a CPU has beside its tensors, and what its data workers have."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from librobot.config.check import targets
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
    names = sorted({node["_target_"] for _, node in targets(OmegaConf.to_container(cfg))})
    module = "librobot.training.estimates.runtime"
    command = [sys.executable, "-m", module, *names]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return int(done.stdout.split()[-1])
    except (ValueError, IndexError) as error:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LibrobotError(
            f"the memory of an empty training process could not be measured: {last}"
        ) from error
