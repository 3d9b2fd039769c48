"""The memory of a data worker while it prepares samples."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import theilslopes
from torch.utils.data import get_worker_info

from librobot.bench import _loaders
from librobot.bench._loaders import WARM_BATCHES, Task
from librobot.bench._process_memory import own_mebibytes
from librobot.bench._rows import Row
from librobot.data.sampler import whole_batch

SETTLED = 0.3
"""The share of the samples after which every file is open and every buffer has its size."""
SECONDS = 1.0
"""Between two measurements, each of which takes some milliseconds."""
LEAST = 3
"""Measurements that a line needs."""


@dataclass(frozen=True)
class Series:
    """What a process had, in MiB, after so many samples; `rate` of them were made in a second, for
    `milliseconds` each on the clock that counts."""

    samples: Sequence[int]
    memory: Sequence[float]
    rate: float
    milliseconds: float

    def row(self, name: str, goal: float | None = 1.05) -> Row:
        """The memory after an hour at this rate, by the slope, beside that when everything was open."""
        begin = int(SETTLED * len(self.samples))
        x, y = np.array(self.samples[begin:]), np.array(self.memory[begin:])
        slope, _, low, high = (1000 * float(value) for value in theilslopes(y, x, alpha=0.95))
        level = float(np.median(y[: max(1, len(y) // 3)]))
        hour = 3600 * self.rate
        return Row(
            f"{name}, an hour on ({slope:+.3f} MiB per 1000 samples, 95%: {low:+.3f} to {high:+.3f})",
            level + slope * hour / 1000,
            level,
            f"after {x[0]} samples",
            "MiB",
            goal,
        )


def measure_memory(root: Path, arguments: argparse.Namespace) -> Row:
    """One worker's own memory when a batch is whole, for `--memory-seconds`; a plot beside the JSON."""
    task = Task(root, 1, None, arguments.batch_size, 1)
    lap = _loaders.sample_order(root, "shuffle", 1 << 40, task.batch_size, 1)
    order = lap * 1000  # more than there is time for
    batches = iter(_loaders.ours(task, order, "none", Path(), collate=Weighed()))
    series = watched(batches, task.batch_size, arguments.memory_seconds, time.perf_counter)
    plot({"librobot": series}, arguments.output.with_name(f"{arguments.output.stem}_memory.png"))
    return series.row("a worker's memory")


class Weighed:
    """The collate in a worker: a batch, and about every second the memory of the first worker beside it."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, batch: Any) -> tuple[Any, float | None]:
        worker, now = get_worker_info(), time.monotonic()
        if (worker is not None and worker.id) or now - self.last < SECONDS:
            return whole_batch(batch), None
        self.last = now
        return whole_batch(batch), own_mebibytes()


def watched(
    batches: Iterator[tuple[Any, float | None]],
    batch_size: int,
    seconds: float,
    spent: Callable[[], float],
) -> Series:
    """Take batches for so long, after those that the workers had ready; `spent` is the clock that counts."""
    for _ in range(WARM_BATCHES):
        next(batches)
    samples: list[int] = []
    memory: list[float] = []
    count, begun, start = 0, time.perf_counter(), spent()
    while len(memory) < LEAST or time.perf_counter() - begun < seconds:
        _, held = next(batches)
        count += batch_size
        if held is not None:
            samples.append(count)
            memory.append(held)
    per_sample = 1000 * (spent() - start) / count
    return Series(samples, memory, count / (time.perf_counter() - begun), per_sample)


def plot(series: dict[str, Series], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes: Any = figure.subplots()
    for name, one in series.items():
        axes.plot(one.samples, one.memory, label=name)
    axes.set(xlabel="samples", ylabel="MiB", title="memory of a data worker", ylim=(0, None))
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
