"""The memory of a data worker while it prepares samples."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import theilslopes

from librobot.bench import _loaders
from librobot.bench._loaders import Task
from librobot.bench._process_memory import own_mebibytes
from librobot.bench._rows import Row
from librobot.data.sampler import whole_batch

SETTLED = 0.3
"""The share of the samples after which every file is open and every buffer has its size."""
POINTS = 400
"""Most of them that a line is fitted to."""


@dataclass(frozen=True)
class Series:
    """What a process had, in MiB, after so many samples; `rate` of them were made in a second."""

    samples: Sequence[int]
    memory: Sequence[float]
    rate: float

    def row(self, name: str) -> Row:
        """The memory after an hour at this rate, by the slope, beside that when everything was open."""
        begin = int(SETTLED * len(self.samples))
        x, y = np.array(self.samples[begin:]), np.array(self.memory[begin:])
        kept = np.linspace(0, len(x) - 1, min(POINTS, len(x))).astype(int)
        slope, _, low, high = (1000 * float(value) for value in theilslopes(y[kept], x[kept], alpha=0.95))
        level = float(np.median(y[: max(1, len(y) // 3)]))
        hour = 3600 * self.rate
        return Row(
            f"{name}, an hour on ({slope:+.3f} MiB per 1000 samples, 95%: {low:+.3f} to {high:+.3f})",
            level + slope * hour / 1000,
            level,
            f"after {x[0]} samples",
            "MiB",
            1.05,
        )


def measure_memory(root: Path, arguments: argparse.Namespace) -> Row:
    """One worker's own memory after each of its batches, for `--memory-seconds`; a plot beside the JSON."""
    task = Task(root, 1, None, arguments.batch_size, 1)
    lap = _loaders.sample_order(root, "shuffle", 1 << 40, task.batch_size, 1)
    order = lap * 1000  # more than there is time for
    series = watched(
        _loaders.ours(task, order, "none", Path(), collate=weighed), task.batch_size, arguments.memory_seconds
    )
    plot({"librobot": series}, arguments.output.with_name(f"{arguments.output.stem}_memory.png"))
    return series.row("a worker's memory")


def weighed(batch: Any) -> tuple[Any, float]:
    """In the worker, when a batch is whole: with the worker's own memory."""
    return whole_batch(batch), own_mebibytes()


def watched(batches: Iterable[tuple[Any, float]], batch_size: int, seconds: float) -> Series:
    """Take batches for so long."""
    memory: list[float] = []
    times: list[float] = []
    taken: Iterator[tuple[Any, float]] = iter(batches)
    deadline = time.perf_counter() + seconds
    while len(memory) < 10 or time.perf_counter() < deadline:
        memory.append(next(taken)[1])
        times.append(time.perf_counter())
    return Series(
        [batch_size * (number + 1) for number in range(len(memory))],
        memory,
        batch_size * (len(times) - 1) / (times[-1] - times[0]),
    )


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
