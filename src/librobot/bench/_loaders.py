"""The same samples through librobot's loader and through lerobot's, in batches from data workers."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from librobot.data.block_order import BlockOrder
from librobot.data.datamodule import DataModule
from librobot.data.metadata import read_info
from librobot.data.sampler import whole_batch
from librobot.data.sources.base import CacheMode
from librobot.data.sources.lerobot import LeRobotSource
from librobot.data.windows import WindowDataset, Windows
from librobot.errors import LibrobotError, require

BACKENDS = ("torchcodec", "pyav")
"""lerobot's, the faster one first."""

HORIZON = 50
WARM_BATCHES = 6
"""More than two workers prepare ahead."""

LEAST_BATCHES = 24


@dataclass(frozen=True)
class Task:
    """What a loader has to deliver: `window` frames of each camera and 50 actions for every sample."""

    root: Path
    window: int = 1
    image_size: tuple[int, int] | None = None
    batch_size: int = 32
    num_workers: int = 2


def ours(
    task: Task,
    samples: Sequence[int],
    cache: CacheMode,
    cache_dir: Path,
    collate: Callable[[Any], Any] = whole_batch,
) -> Iterable[Any]:
    """librobot's loader over `samples`, in this order."""
    source = LeRobotSource(task.root, image_size=task.image_size, cache=cache, cache_dir=cache_dir)
    windows = Windows(
        source.episode_lengths,
        list(range(len(source.episode_lengths))),
        horizon=HORIZON,
        obs_steps=task.window,
    )
    return loader(WindowDataset(source, windows), task, samples, collate_fn=collate)


def peer(task: Task, samples: Sequence[int], backend: str) -> Iterable[Any]:
    """lerobot's loader as `lerobot-train` makes it: uint8 frames, the default collate."""
    require("lerobot", "lerobot")
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from torchvision.transforms import v2

    info = read_info(task.root)
    fps = info["fps"]
    steps = {"action": [i / fps for i in range(HORIZON)]}
    if task.window > 1:
        past = [i / fps for i in range(1 - task.window, 1)]
        steps |= {key: past for key, feature in info["features"].items() if feature["dtype"] == "video"}
    dataset = LeRobotDataset(
        "bench/data",
        root=task.root,
        delta_timestamps=steps,
        video_backend=backend,
        return_uint8=True,
        image_transforms=v2.Resize(task.image_size, antialias=True) if task.image_size else None,
    )
    return loader(dataset, task, samples)


def loader(dataset: Any, task: Task, samples: Sequence[int], **options: Any) -> DataLoader[Any]:
    if task.num_workers:
        options |= {"num_workers": task.num_workers, "prefetch_factor": 2}
    return DataLoader(dataset, batch_size=task.batch_size, sampler=_Fixed(samples), **options)


class _Fixed(torch.utils.data.Sampler[int]):
    def __init__(self, samples: Sequence[int]) -> None:
        self.samples = list(samples)

    def __iter__(self) -> Iterator[int]:
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)


def best_backend(root: Path) -> str:
    """The first of lerobot's back ends that works here."""
    problems = []
    for backend in BACKENDS:
        try:
            # In a worker: lerobot's decoders must not be open when further workers are forked.
            next(iter(peer(Task(root, num_workers=1, batch_size=1), [0], backend)))
            return backend
        except (ImportError, RuntimeError, OSError) as error:
            problems.append(f"{backend}: {str(error).splitlines()[0]}")
    raise LibrobotError(f"lerobot reads video with none of its back ends: {'; '.join(problems)}")


def milliseconds_per_sample(loader: Any, batch_size: int, clock: str) -> float:
    """Of the batches after the first few, which the workers have ready when the clock starts, without as many
    last ones, which they have ready when it stops; clock="cpu": spent by this process and the workers."""
    batches = iter(loader)
    for _ in range(WARM_BATCHES):
        next(batches)
    spent = clock_of(batches, clock)
    start = spent()
    count = sum(1 for _ in _until_last(batches))
    if not count:
        raise LibrobotError(f"at least {LEAST_BATCHES} batches are needed; raise --samples or --episodes")
    return 1000 * (spent() - start) / (count * batch_size)


def _until_last(batches: Iterator[Any]) -> Iterator[Any]:
    """All but the last batches: when the workers run out of work, those that are ready would count too
    little."""
    total = len(batches)  # type: ignore[arg-type]
    for _ in range(total - 2 * WARM_BATCHES):
        yield next(batches)


def clock_of(batches: Any, clock: str) -> Any:
    if clock == "wall":
        return time.perf_counter
    ticks = os.sysconf("SC_CLK_TCK")
    workers = [worker.pid for worker in getattr(batches, "_workers", ())]

    def spent() -> float:
        total = time.process_time()
        for pid in workers:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / ticks
        return total

    return spent


def sample_order(root: Path, kind: str, count: int, batch_size: int, block: int) -> list[int]:
    """The first `count` samples of an epoch: "shuffle", "blocks" of so many neighbours, or "rows"."""
    lengths = LeRobotSource(root).episode_lengths
    if kind == "rows":
        order = np.arange(lengths.sum())
    elif kind == "blocks":
        order = BlockOrder(np.repeat(np.arange(len(lengths)), lengths), block, seed=0).indices(0)
    else:
        order = np.random.default_rng([0, 0]).permutation(lengths.sum())
    whole = min(count, len(order)) // batch_size * batch_size
    return order[:whole].tolist()


def first_batch(root: Path, num_workers: int, backend: str | None) -> None:
    """Everything from the opening of the dataset to its first batch, by lerobot where a back end is named;
    prints the seconds, without the imports.

    For a process of its own."""
    torch.set_num_threads(1)
    task = Task(root, num_workers=num_workers)
    if backend is not None:
        importlib.import_module("lerobot.datasets.lerobot_dataset")
        start = time.perf_counter()
        shuffled = np.random.default_rng(0).permutation(read_info(root)["total_frames"])
        next(iter(peer(task, shuffled[: task.batch_size * 8].tolist(), backend)))
        print(time.perf_counter() - start)
        return
    start = time.perf_counter()
    module = DataModule(partial(LeRobotSource, root), batch_size=task.batch_size, num_workers=num_workers)
    module.configure(horizon=HORIZON)
    next(iter(module.train_dataloader()))
    print(time.perf_counter() - start)
