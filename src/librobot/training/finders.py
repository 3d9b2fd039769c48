"""librobot-train --find-lr and --find-batch-size: what the loss, and what the memory, would bear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch.tuner import Tuner
from omegaconf import DictConfig, open_dict

from librobot.errors import LibrobotError
from librobot.training.estimates.before import chip_of
from librobot.training.estimates.estimate import estimate, gigabytes, number_of_devices

TRIALS = 100
LOWEST, HIGHEST = 1e-7, 1.0
SAFE = 0.9
"""The share of the free memory that a batch may take: allocators do not give back all that is free."""


def find(cfg: DictConfig, what: str) -> float | int:
    """Find the learning rate or the batch size of a configuration with `run_dir`, print it, and return it."""
    if number_of_devices(cfg.trainer) > 1:
        raise LibrobotError(
            f"--{what.replace('_', '-')}: expected trainer.devices=1: all devices do the same"
        )
    return find_lr(cfg) if what == "find_lr" else find_batch_size(cfg)


def find_lr(cfg: DictConfig, trials: int = TRIALS) -> float:
    """The range test (Smith 2017) by Lightning's tuner: the rate rises by a constant factor each step, and
    the one where the loss falls most steeply is suggested.

    Writes lr.png and lr.json into the run directory. All parts take the same rate, without multipliers.
    Raises LibrobotError where the loss falls nowhere.
    """
    from librobot.training.run import prepare

    with open_dict(cfg):
        cfg.callbacks, cfg.logger, cfg.ckpt = {}, {}, None
        cfg.trainer.enable_checkpointing = cfg.trainer.enable_progress_bar = False
    trainer, framework, datamodule = prepare(cfg)
    found: Any = Tuner(trainer).lr_find(
        framework,
        datamodule=datamodule,
        min_lr=LOWEST,
        max_lr=HIGHEST,
        num_training=trials,
        update_attr=False,
    )
    rates, losses = found.results["lr"], found.results["loss"]
    best = found.suggestion()
    if best is None:
        raise LibrobotError(
            f"--find-lr: the loss fell nowhere in {len(rates)} steps ({losses[0]:.4g} to {losses[-1]:.4g})"
            if losses
            else "--find-lr: no step was made"
        )
    folder = Path(cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "lr.json", json.dumps({"lr": rates, "loss": losses, "suggestion": best}))
    plot(folder / "lr.png", rates, losses, best)
    print(f"optim.lr={best:.3g} is where the loss falls most steeply; {folder / 'lr.png'}", flush=True)
    return float(best)


def find_batch_size(cfg: DictConfig) -> int:
    """The largest batch that fits into the free memory of the device, by estimates: memory grows by the same
    amount with each sample, so two sizes tell it, and a third one checks."""
    chip = chip_of(cfg.trainer)
    free = SAFE * chip.memory * 1e9

    def peak(size: int) -> float:
        with open_dict(cfg):
            cfg.data.batch_size = size
        return estimate(cfg, [(chip, 1)]).devices[0].peak

    small, large = 8, 16
    each = (peak(large) - peak(small)) / (large - small)
    fixed = peak(small) - small * each
    if fixed + each > free:
        raise LibrobotError(
            f"--find-batch-size: one sample takes {gigabytes(fixed + each)} GB, of {chip.memory:.4g} GB that "
            f"are free; librobot-train --estimate says what helps"
        )
    size = int((free - fixed) / each)
    while size > 1 and peak(size) > free:
        size = int(0.95 * size)
    print(
        f"data.batch_size={size} takes {gigabytes(peak(size))} GB of {chip.memory:.4g} GB that are free on "
        f"{chip.name} ({gigabytes(each)} GB a sample)",
        flush=True,
    )
    return size


def plot(path: Path, rates: list[float], losses: list[float], best: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color="#3a6ea5")
    axes.axvline(best, color="#b03a36", linestyle="--", label=f"optim.lr={best:.3g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss, smoothed")
    axes.legend()
    partial = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(partial, dpi=150)
    partial.replace(path)


def write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
