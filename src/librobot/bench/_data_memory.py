"""The memory of a data worker over many samples."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from librobot.bench import _loaders
from librobot.bench._loaders import Task
from librobot.bench._rows import Row


def measure_memory(root: Path, arguments: argparse.Namespace) -> Row:
    """One worker's own memory, early and at the end; a plot beside the JSON. Batches lie in shared memory,
    which is not counted: it is there while a batch is on its way."""
    task = Task(root, 1, None, arguments.batch_size, 1)
    lap = _loaders.sample_order(root, "shuffle", arguments.memory_samples, task.batch_size, 1)
    order = [*lap] * max(1, arguments.memory_samples // len(lap))
    batches = iter(_loaders.ours(task, order, "none", Path()))
    (worker,) = batches._workers  # type: ignore[attr-defined]
    samples: list[int] = []
    memory: list[float] = []
    for number in range(len(order) // task.batch_size - 1):
        next(batches)
        samples.append((number + 1) * task.batch_size)
        memory.append(own_mebibytes(worker.pid))
    plot(samples, memory, arguments.output.with_name(f"{arguments.output.stem}_memory.png"))
    tenth = max(1, len(memory) // 10)
    return Row(
        f"a worker's memory after {samples[-1]} samples",
        statistics.median(memory[-tenth:]),
        statistics.median(memory[2 * tenth : 3 * tenth] or memory),
        f"the same after {samples[2 * tenth]}",
        "MiB",
        1.05,
    )


def own_mebibytes(pid: int) -> float:
    """The anonymous memory of a process, in MiB (status: RssAnon)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def plot(samples: list[int], memory: list[float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes: Any = figure.subplots()
    axes.plot(samples, memory)
    axes.set(xlabel="samples", ylabel="MiB", title="memory of a data worker", ylim=(0, None))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
