"""librobot-bench data: librobot's loader beside LeRobotDataset, on the same files, with as many workers.

Two cameras of 480x640 as AV1 (lerobot's default encoding), chunks of 50 actions. Both sides deliver the same
samples as uint8 batches out of as many data workers, in turns; a row is the median over the rounds. lerobot
has its best back end that works (torchcodec, else PyAV) and `return_uint8`, as in its training. Where the
frames are 224x224, lerobot resizes them by torchvision. Rows named "blocks of k" compare librobot's
order=blocks with lerobot's shuffle; the row "spread of batches" says what that order costs in randomness.
Rows named "our decoder alone" are the least that a loader on our decoder could take, beside lerobot's whole.
RLDS is compared with TFDS and tf.data, in a process of their own; dlimp, made of the two, has no release.
ffmpeg, which the row "order of the files" needs, is Debian's package of that name.

The dataset is written once, into --root.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from librobot.bench import _loaders
from librobot.bench._data_memory import measure_memory
from librobot.bench._decoder_alone import decoder_alone
from librobot.bench._footage import write_footage, write_tables
from librobot.bench._loaders import Task
from librobot.bench._rlds import measure_rlds
from librobot.bench._rows import Row, print_rows, write_rows
from librobot.data.block_order import batch_spread
from librobot.data.sources.base import CacheMode
from librobot.data.sources.lerobot import LeRobotSource
from librobot.data.tensorflow_process import check_tensorflow
from librobot.errors import LibrobotError, require
from librobot.progress import ProgressBar

OUTPUT = Path("outputs/bench/data.json")
SMALL = (224, 224)


def main(options: Sequence[str]) -> list[Row]:
    """Measure, print a table, write the JSON and the plot of memory; returns the rows."""
    arguments = parser().parse_args(list(options))
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=arguments.cache_dir) as cache_dir:
        measurements: list[Callable[[], list[Row]]] = []
        if arguments.only != "rlds":
            require("lerobot", "lerobot")
            measurements += beside_lerobot(arguments, Path(cache_dir))
        if arguments.only != "lerobot":
            check_tensorflow()
            measurements.append(lambda: measure_rlds(arguments))
        with ProgressBar("measurements", len(measurements)) as progress:
            for measure in measurements:
                rows += measure()
                progress.advance()
    write_rows(arguments.output, rows)
    print_rows("data", rows, arguments.output)
    return rows


def beside_lerobot(arguments: argparse.Namespace, folder: Path) -> list[Callable[[], list[Row]]]:
    """The measurements on a LeRobotDataset, which is written if need be."""
    os.environ.setdefault("SVT_LOG", "1")  # the encoder's banners, one for every episode
    root = arguments.root or Path(f"outputs/bench/footage-{arguments.episodes}x{arguments.length}")
    if (
        not (root / "meta/info.json").exists()
        or LeRobotSource(root).episode_lengths.size < arguments.episodes
    ):
        write_footage(root, episodes=arguments.episodes, length=arguments.length)
    arguments.root = root
    backend = _loaders.best_backend(root)
    return [
        *(partial(throughput, arguments, backend, folder, *case) for case in CASES),
        lambda: [cache_bytes(root, folder)],
        lambda: [share_of_decoder(arguments, folder)],
        lambda: [spread_of_batches(root, arguments.block)],
        lambda: [statistics_pass(arguments)],
        lambda: start_up(arguments, backend),
        lambda: [measure_memory(root, arguments)],
    ]


CASES: list[tuple[str, str, int, tuple[int, int] | None, CacheMode, float]] = [
    # name, order, frames in a window, image size, cache, goal
    ("random order", "shuffle", 1, None, "none", 0.4),
    ("blocks of {block}", "blocks", 1, None, "none", 0.4),
    ("random order, windows of 8 frames", "shuffle", 8, None, "none", 1 / 3),
    ("blocks of {window_block}, windows of 8 frames", "blocks", 8, None, "none", 1 / 3),
    ("random order, 224x224, cache=video", "shuffle", 1, SMALL, "video", 1 / 8),
    ("random order, windows of 8 frames, 224x224, cache=video", "shuffle", 8, SMALL, "video", 1 / 8),
    ("random order, 224x224, cache=memmap", "shuffle", 1, SMALL, "memmap", 1 / 20),
]


def throughput(
    arguments: argparse.Namespace,
    backend: str,
    cache_dir: Path,
    name: str,
    order: str,
    window: int,
    image_size: tuple[int, int] | None,
    cache: CacheMode,
    goal: float,
) -> list[Row]:
    """Milliseconds per sample of both loaders, in turns; where ours decodes in random order, also of its
    decoder alone."""
    batch_size = arguments.batch_size if window == 1 else arguments.batch_size // 2
    task = Task(arguments.root, window, image_size, batch_size, arguments.num_workers)
    block = arguments.block if window == 1 else arguments.window_block
    count = max(arguments.samples if window == 1 else 0, _loaders.LEAST_BATCHES * batch_size)
    random = _loaders.sample_order(task.root, "shuffle", count, task.batch_size, block)
    own = _loaders.sample_order(task.root, order, count, task.batch_size, block)
    _loaders.ours(task, own, cache, cache_dir)  # makes the cache
    sides: dict[str, Callable[[], Iterable[Any]]] = {
        "peer": lambda: _loaders.peer(task, random, backend),
        "ours": lambda: _loaders.ours(task, own, cache, cache_dir),
    }
    if cache == "none" and order == "shuffle":
        sides["decoder"] = lambda: decoder_alone(task, random)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(arguments.rounds):
        for side, made in sides.items():
            spent = _loaders.milliseconds_per_sample(made(), task.batch_size, arguments.clock)
            times[side].append(spent)
    found = {side: statistics.median(spent) for side, spent in times.items()}
    title = name.format(block=arguments.block, window_block=arguments.window_block)
    peer = found["peer"], f"lerobot, shuffled, {backend}"
    unit = f"ms{' CPU' if arguments.clock == 'cpu' else ''}/sample"
    rows = [Row(title, found["ours"], *peer, unit, goal)]
    if "decoder" in found:
        rows.append(Row(f"{title}: our decoder alone", found["decoder"], *peer, unit))
    return rows


def cache_bytes(root: Path, cache_dir: Path) -> Row:
    """The bytes of the derived video over those of the dataset's own."""
    derived = sum(path.stat().st_size for path in cache_dir.rglob("*.mp4"))
    source = sum(path.stat().st_size for path in (root / "videos").rglob("*.mp4"))
    frames = 2 * int(LeRobotSource(root).episode_lengths.sum())
    return Row("cache=video, size", derived / frames, source / frames, "the dataset", "bytes/frame", 0.35)


def share_of_decoder(arguments: argparse.Namespace, cache_dir: Path) -> Row:
    """Reading in the order of the files beside ffmpeg's bare decoding of the same files on as many cores."""
    if shutil.which("ffmpeg") is None:
        raise LibrobotError("ffmpeg is needed to measure what it decodes; install it: apt-get install ffmpeg")
    files = sorted((arguments.root / "videos").rglob("*.mp4"))
    task = Task(arguments.root, 1, None, arguments.batch_size, arguments.num_workers)
    total = int(LeRobotSource(task.root).episode_lengths.sum())
    order = _loaders.sample_order(task.root, "rows", total, task.batch_size, 1)
    own, bare = [], []
    for _ in range(arguments.rounds):
        bare.append(ffmpeg_milliseconds(files, arguments.num_workers, arguments.clock) / (2 * total))
        loader = _loaders.ours(task, order, "none", cache_dir)
        per_sample = _loaders.milliseconds_per_sample(loader, task.batch_size, arguments.clock)
        own.append(per_sample / 2)
    return Row(
        "order of the files (goal: 70% of the decoder's speed)",
        statistics.median(own),
        statistics.median(bare),
        f"ffmpeg -f null, {arguments.num_workers} at a time",
        f"ms{' CPU' if arguments.clock == 'cpu' else ''}/frame",
        1 / 0.7,
    )


def ffmpeg_milliseconds(files: Sequence[Path], at_once: int, clock: str) -> float:
    """To decode all files, so many at a time, each on one thread."""
    children = os.times()
    start = time.perf_counter()
    waiting = list(files)
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        while waiting and len(running) < max(1, at_once):
            command = ["ffmpeg", "-v", "error", "-nostdin", "-threads", "1", "-i", str(waiting.pop())]
            running.append(subprocess.Popen([*command, "-f", "null", "-"]))
        if running.pop(0).wait():
            raise LibrobotError("ffmpeg could not decode the dataset's videos; its message stands above")
    if clock == "wall":
        return 1000 * (time.perf_counter() - start)
    after = os.times()
    return 1000 * (
        after.children_user + after.children_system - children.children_user - children.children_system
    )


def spread_of_batches(root: Path, block: int) -> Row:
    """How much the mean states of batches vary: 1 for independent samples."""
    source = LeRobotSource(root)
    states = source._states
    own, shuffled = (
        batch_spread(np.array(_loaders.sample_order(root, kind, len(states), 32, block)), states, 32)
        for kind in ("blocks", "shuffle")
    )
    return Row(f"spread of batches, blocks of {block} (1: independent)", own, shuffled, "shuffled", "x")


def statistics_pass(arguments: argparse.Namespace) -> Row:
    """Statistics of states and actions: ours from opening the dataset on, lerobot's of an open one."""
    from lerobot.datasets.dataset_tools import recompute_stats
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    own, other = [], []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tables"
        write_tables(root, episodes=arguments.table_episodes, length=300)
        dataset = LeRobotDataset("bench/tables", root=root)
        for _ in range(arguments.rounds):
            start = time.perf_counter()
            recompute_stats(dataset)
            middle = time.perf_counter()
            LeRobotSource(root).statistics()
            other.append(middle - start)
            own.append(time.perf_counter() - middle)
    rows = arguments.table_episodes * 300
    return Row(
        f"statistics of {rows} states and actions",
        statistics.median(own),
        statistics.median(other),
        "lerobot recompute_stats",
        "s",
        0.05,
    )


def start_up(arguments: argparse.Namespace, backend: str) -> list[Row]:
    """From the opening of the dataset to the first batch, workers included; and from the start of a process,
    with what it imports."""
    times: tuple[list[float], list[float]] = ([], [])
    inner: tuple[list[float], list[float]] = ([], [])
    for _ in range(arguments.rounds):
        for side, chosen in ((1, backend), (0, None)):
            call = f"first_batch(Path({str(arguments.root)!r}), {arguments.num_workers}, {chosen!r})"
            code = f"from pathlib import Path; from librobot.bench._loaders import first_batch; {call}"
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            times[side].append(time.perf_counter() - start)
            inner[side].append(float(done.stdout.split()[-1]))
    name = f"lerobot, {backend}"
    return [
        Row(title, statistics.median(own), statistics.median(other), name, "s", 0.5)
        for title, (own, other) in (
            ("opening the dataset to the first batch", inner),
            ("start of a process, with its imports, to the first batch", times),
        )
    ]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("librobot-bench data", description=__doc__.partition("\n")[0])
    made.add_argument("--only", choices=("lerobot", "rlds"), help="the rows beside this format's own reader")
    made.add_argument("--root", type=Path, help="a LeRobotDataset with two cameras; default: written")
    made.add_argument("--episodes", type=int, default=10, help="of the dataset that is written")
    made.add_argument("--length", type=int, default=300, help="frames of each of its episodes")
    made.add_argument("--samples", type=int, default=768, help="of a round; with windows 24 half batches")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--batch-size", type=int, default=32)
    made.add_argument("--num-workers", type=int, default=2)
    made.add_argument("--block", type=int, default=2, help="neighbouring frames that come into one batch")
    made.add_argument("--window-block", type=int, default=8, help="the same with windows")
    made.add_argument("--table-episodes", type=int, default=300, help="of 300 frames, for the statistics")
    made.add_argument(
        "--rlds-root", type=Path, help="an RLDS folder as the bench writes it; default: written"
    )
    made.add_argument(
        "--rlds-episodes", type=int, default=20, help="of 120 steps, of the one that is written"
    )
    made.add_argument("--rlds-seconds", type=float, default=30, help="of each round and side")
    made.add_argument("--memory-seconds", type=float, default=60, help="that a worker's memory is watched")
    made.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a machine that others use too"
    )
    made.add_argument("--cache-dir", type=Path, help="where derived frames are kept meanwhile")
    made.add_argument("--output", type=Path, default=OUTPUT)
    return made
