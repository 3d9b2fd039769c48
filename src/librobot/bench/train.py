"""librobot-bench train: what EMA, logging, statistics and the saving of checkpoints add to a training step.

All variants train the same model from the same seed on the same batches, in this one process, in turns: each
round runs every variant once, in an order that is turned round by one each time, beside a run without any
callback. The median of the rounds' ratios counts.

Checkpoints are saved every `--save-every` steps. What they cost is too little for that: it is told from the
steps of one run, the half of those between two saves that begins with a save beside the other half.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning import Trainer
from omegaconf import DictConfig, open_dict

from librobot.bench._rows import Row, print_rows, write_rows
from librobot.bench.step import MODELS, StepTimer, loader, make_batches, make_framework, mean_step
from librobot.config.build import build_trainer
from librobot.config.compose import compose
from librobot.errors import LibrobotError
from librobot.training.callbacks.checkpoints import SaveCheckpoints
from librobot.types import Batch

OUTPUT = Path("outputs/bench/train.json")
HORIZON = 10
BARE, SYNCHRONOUS, ASYNCHRONOUS = "bare", "checkpoints", "checkpoints, asynchronous"
SAVING = (SYNCHRONOUS, ASYNCHRONOUS)
BASE = ["callbacks=progress", "logger=none"]


def without(*left_out: str) -> list[str]:
    """The statistics as a run has them, but for some."""
    return [
        "callbacks=[progress,statistics]",
        "logger=none",
        *(f"callbacks.{name}=null" for name in left_out),
    ]


VARIANTS = {
    "logging to CSV": ["callbacks=progress", "logger=csv"],
    "logging to TensorBoard": ["callbacks=progress", "logger=tensorboard"],
    "EMA": ["callbacks=[progress,ema]", "logger=none"],
    "gradient norms, throughput, MFU": without("losses", "activations"),
    "parts of the loss": without("action_errors", "gradients", "activations", "throughput", "utilisation"),
    "activations": without("action_errors", "gradients", "losses", "throughput", "utilisation"),
    "default callbacks and CSV": ["callbacks=default", "logger=csv"],
    SYNCHRONOUS: ["callbacks=progress", "logger=none"],
    ASYNCHRONOUS: ["callbacks=progress", "logger=none"],
}
GOALS = {ASYNCHRONOUS: 1.02}


def main(options: Sequence[str]) -> list[Row]:
    """Measure, print a table, write the JSON; returns the rows."""
    arguments = parser().parse_args(list(options))
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    rows = measure(arguments.variants, arguments)
    write_rows(arguments.output, rows)
    print_rows("overheads of a training step", rows, arguments.output)
    return rows


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("librobot-bench train", description=__doc__.partition("\n")[0])
    made.add_argument("--framework", default="act", choices=sorted(MODELS))
    made.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument("--steps", type=int, default=200, help="measured steps in a round")
    made.add_argument("--warmup", type=int, default=5, help="steps before them")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--save-every", type=int, default=50, help="steps between two checkpoints")
    made.add_argument("--output", type=Path, default=OUTPUT)
    made.add_argument("overrides", nargs="*", help="of the configuration: vlm.num_layers=4")
    return made


def measure(variants: Sequence[str], arguments: argparse.Namespace) -> list[Row]:
    """A row for each variant: the median ratio of the rounds, and the step times that it means."""
    batches = make_batches(arguments.batch_size, horizon=HORIZON, count=8)
    times: dict[str, list[float]] = {name: [] for name in (BARE, *variants)}
    saves: dict[str, list[tuple[float, float]]] = {name: [] for name in variants if name in SAVING}
    for number in range(arguments.rounds):
        order = [BARE, *variants]
        for name in order[number % len(order) :] + order[: number % len(order)]:
            ends = one_round(name, batches, arguments)
            times[name].append(mean_step(ends, arguments.warmup))
            if name in SAVING:
                saves[name] += between_saves(ends, arguments.save_every)
        print(
            f"round {number + 1}/{arguments.rounds}: "
            + ", ".join(f"{name} {own[-1]:.2f} ms" for name, own in times.items()),
            flush=True,
        )
    bare = statistics.median(times[BARE])
    rows = []
    for name in variants:
        if name in SAVING:
            rows.append(row_of_saves(name, saves[name]))
            continue
        ratio = statistics.median(own / base for own, base in zip(times[name], times[BARE], strict=True))
        rows.append(Row(name, ratio * bare, bare, "no callback, no logger", "ms", GOALS.get(name)))
    return rows


def between_saves(ends: Sequence[float], every: int) -> list[tuple[float, float]]:
    """(ms of all steps, ms of those far from a save), means of the stretch from each save to the next.
    `ends` are the steps' in seconds; a save comes at the end of every `every`-th."""
    steps = [1000 * (b - a) for a, b in itertools.pairwise(ends)]  # the first is step 2
    found = []
    for start in range(every - 1, len(steps) - every + 1, every):
        near, far = steps[start : start + every // 2], steps[start + every // 2 : start + every]
        found.append((statistics.fmean(near + far), statistics.fmean(far)))
    return found


def row_of_saves(name: str, found: Sequence[tuple[float, float]]) -> Row:
    if not found:
        raise LibrobotError(f"{name}: no stretch between two saves; raise --steps or lower --save-every")
    far = statistics.median(pair[1] for pair in found)
    ratio = statistics.median(whole / rest for whole, rest in found)
    return Row(name, ratio * far, far, "the same run's steps far from a save", "ms", GOALS.get(name))


def one_round(name: str, batches: list[Batch], arguments: argparse.Namespace) -> list[float]:
    """When each step of a variant ends, in seconds."""
    with tempfile.TemporaryDirectory(prefix="librobot-bench-") as folder:
        cfg = configuration(name, folder, arguments)
        framework = make_framework(cfg)
        trainer: Trainer = build_trainer(cfg)
        timer = StepTimer()
        trainer.callbacks.append(timer)  # type: ignore[attr-defined]
        if name in SAVING:
            saving = SaveCheckpoints(
                f"{folder}/checkpoints",
                every_n_steps=arguments.save_every,
                asynchronous=name == ASYNCHRONOUS,
            )
            trainer.callbacks.append(saving)  # type: ignore[attr-defined]
        trainer.fit(framework, train_dataloaders=loader(batches))
    return timer.ends


def configuration(name: str, folder: str, arguments: argparse.Namespace) -> DictConfig:
    """The training configuration of a variant, on this machine's CPU."""
    own = BASE if name == BARE else VARIANTS[name]
    cfg = compose(
        [
            *MODELS[arguments.framework],
            "trainer=cpu",
            f"trainer.max_steps={arguments.warmup + arguments.steps}",
            f"run_dir={folder}",
            "name=bench",
            *own,
            *arguments.overrides,
        ]
    )
    with open_dict(cfg):
        cfg.callbacks.pop("action_errors", None)  # of validation, which there is none of
    return cfg
