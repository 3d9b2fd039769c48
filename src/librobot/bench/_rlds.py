"""librobot's RLDS source beside TFDS and tf.data, on the same folder, with as many threads as workers."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from librobot.bench import _loaders
from librobot.bench._data_memory import LEAST, SECONDS, Series, Weighed, plot, watched
from librobot.bench._footage import FPS, JOINTS, TASKS, motion, view
from librobot.bench._loaders import HORIZON, WARM_BATCHES, Task
from librobot.bench._rows import Row
from librobot.data.datamodule import DataModule
from librobot.data.new_folder import new_folder
from librobot.data.rlds_writer import RldsWriter
from librobot.data.sources.rlds import RldsSource
from librobot.data.tensorflow_process import run_with_tensorflow
from librobot.data.windows import WindowDataset, Windows
from librobot.progress import ProgressBar
from librobot.types import Camera, Dim, RobotSpec

SIDE = 256
CAMERAS = ("primary", "wrist")
QUALITY = 95
LENGTH = 120
SAMPLES = 1_000_000
"""More than there is time for."""


def write_rlds(root: Path, *, episodes: int) -> None:
    """Footage of two cameras as JPEG, as most of Open X-Embodiment has it."""
    dims = tuple(Dim(f"joint_{i}", "rad", "joint") for i in range(JOINTS))
    spec = RobotSpec("bench", tuple(Camera(name, SIDE, SIDE) for name in CAMERAS), dims, dims, float(FPS))
    described = {"episodes": episodes, "length": LENGTH, "side": SIDE, "jpeg": QUALITY}
    with new_folder(root, described) as folder, ProgressBar("writing RLDS", episodes) as progress:
        writer = RldsWriter(folder, spec, jpeg=QUALITY)
        progress.advance(writer.num_episodes)
        for episode in range(writer.num_episodes, episodes):
            generator = np.random.default_rng([episode, 7])
            state = motion(generator, LENGTH)
            views = [
                view(generator, state[:, 4 * i : 4 * i + 4], SIDE, SIDE, pan=40.0 * i)
                for i in range(len(CAMERAS))
            ]
            writer.add_episode(
                images=dict(zip(CAMERAS, views, strict=True)),
                state=state,
                action=np.concatenate([state[1:], state[-1:]]),
                task=TASKS[episode % len(TASKS)],
            )
            progress.advance()
        writer.finalize()


def measure_rlds(arguments: argparse.Namespace) -> list[Row]:
    """Milliseconds per sample, memory and start of both in turns. In both any sample of an epoch can come
    next."""
    root = arguments.rlds_root or Path(f"outputs/bench/rlds-{arguments.rlds_episodes}x{LENGTH}")
    if not (root / "dataset_info.json").exists():
        write_rlds(root, episodes=arguments.rlds_episodes)
    source = RldsSource(root)
    total = int(source.episode_lengths.sum())
    task = Task(root, 1, None, arguments.batch_size, arguments.num_workers)
    sides: tuple[list[Series], list[Series]] = ([], [])
    for _ in range(arguments.rounds):
        sides[1].append(peer(task, total, arguments))
        sides[0].append(ours(task, source, total, arguments))
    own, other = (statistics.median(one.milliseconds for one in side) for side in sides)
    series = {"librobot, a worker": sides[0][-1], "tfds": sides[1][-1]}
    plot(series, arguments.output.with_name(f"{arguments.output.stem}_rlds_memory.png"))
    held = [float(np.median(one.memory)) for one in series.values()]
    unit = f"ms{' CPU' if arguments.clock == 'cpu' else ''}/sample"
    name = f"tfds, shuffle buffer of {total}"
    return [
        Row(f"RLDS, {len(CAMERAS)} JPEGs of {SIDE}x{SIDE}, random order", own, other, name, unit, 1.0),
        Row(
            "RLDS, memory of all workers (each with what it was forked with)",
            held[0] * max(1, task.num_workers),
            held[1],
            name,
            "MiB",
        ),
        series["librobot, a worker"].row("RLDS, a worker's memory"),
        series["tfds"].row("RLDS, the memory of tfds", goal=None),
        *start_up(task, total, arguments),
    ]


def start_up(task: Task, total: int, arguments: argparse.Namespace) -> list[Row]:
    """From the opening of the folder to its first batch, in a process that has imported everything: for the
    first time, when the shards are read through, and later. tfds fills its shuffle buffer each time."""
    first: list[float] = []
    later: list[float] = []
    other: list[float] = []
    call = f"first_batch(Path({str(task.root)!r}), {task.batch_size}, {task.num_workers})"
    code = f"from pathlib import Path; from librobot.bench._rlds import first_batch; {call}"
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for seconds in (first, later):
                done = subprocess.run(
                    [sys.executable, "-c", code],
                    check=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=os.environ | {"LIBROBOT_CACHE": cache},
                )
                seconds.append(float(done.stdout.split()[-1]))
        other.append(json.loads(run_peer(task, total, arguments, only_first=True))["seconds"])
    name = f"tfds, shuffle buffer of {total}"
    return [
        Row(title, statistics.median(own), statistics.median(other), name, "s", 1.0)
        for title, own in (
            ("RLDS, opening the folder to the first batch, for the first time", first),
            ("RLDS, opening the folder to the first batch, later", later),
        )
    ]


def first_batch(root: Path, batch_size: int, num_workers: int) -> None:
    """Prints the seconds. For a process of its own."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    module = DataModule(partial(RldsSource, root), batch_size=batch_size, num_workers=num_workers)
    module.configure(horizon=HORIZON)
    next(iter(module.train_dataloader()))
    print(time.perf_counter() - start)


def ours(task: Task, source: RldsSource, total: int, arguments: argparse.Namespace) -> Series:
    lengths = source.episode_lengths
    windows = Windows(lengths, list(range(len(lengths))), horizon=HORIZON, obs_steps=1)
    random = np.random.default_rng(0)
    order = np.concatenate([random.permutation(total) for _ in range(1 + SAMPLES // total)]).tolist()
    loader = _loaders.loader(WindowDataset(source, windows), task, order, collate_fn=Weighed())
    batches = iter(loader)
    spent = _loaders.clock_of(batches, arguments.clock)
    return watched(batches, task.batch_size, arguments.rlds_seconds, spent)


def peer(task: Task, total: int, arguments: argparse.Namespace) -> Series:
    """The same of TFDS."""
    return Series(**json.loads(run_peer(task, total, arguments)))


def run_peer(task: Task, total: int, arguments: argparse.Namespace, *, only_first: bool = False) -> str:
    """What TFDS in a process that imports tensorflow says; only_first: it ends after a batch."""
    asked = {
        "root": str(task.root),
        "cameras": CAMERAS,
        "horizon": HORIZON,
        "batch_size": task.batch_size,
        "threads": max(1, task.num_workers),
        "buffer": total,
        "warm_batches": WARM_BATCHES,
        "every": SECONDS,
        "least": LEAST,
        "seconds": arguments.rlds_seconds,
        "clock": arguments.clock,
        "only_first": only_first,
    }
    said: list[str] = []
    log = arguments.output.with_name(f"{arguments.output.stem}_tfds.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    run_with_tensorflow("librobot.bench._tfds_peer", [json.dumps(asked)], log, line=said.append)
    return said[-1]
