"""One training run, in this process: data, policy, trainer, fit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Timer
from omegaconf import DictConfig

from librobot.config.build import (
    build,
    build_datamodule,
    build_framework,
    build_spec,
    build_trainer,
    robots_of,
)
from librobot.config.check import check
from librobot.config.compose import resolve
from librobot.data.datamodule import DataModule
from librobot.data.sources.base import Mixture
from librobot.errors import LibrobotError
from librobot.frameworks.base import Framework
from librobot.training.callbacks.shares import DatasetShares
from librobot.training.checkpoints import check_checkpoint
from librobot.training.estimates.before import warn_of_misfit
from librobot.training.lost import ended_with_the_others
from librobot.training.strategies import built_in_parts, check_machine
from librobot.training.sweeps.jobs import JOB
from librobot.training.sweeps.reports import Reports
from librobot.training.trackers import keep_checkpoints


def run(cfg: DictConfig) -> dict[str, float]:
    """Train what `cfg` (resolved, with `run_dir`) describes; return the final metrics.

    With `ckpt` the run goes on exactly where that checkpoint was taken: weights, statistics, optimiser,
    schedule, random numbers and the place in the data. Raises LibrobotError before anything is trained
    where the configuration, the dataset or the checkpoint do not fit each other.
    """
    trainer, framework, datamodule = prepare(cfg)
    warn_of_misfit(cfg, framework)
    with ended_with_the_others(trainer, Path(cfg.run_dir)):
        trainer.fit(
            framework, datamodule=datamodule, ckpt_path=cfg.ckpt, weights_only=True if cfg.ckpt else None
        )
    metrics = final_metrics(trainer)
    if trainer.is_global_zero:
        keep_checkpoints(trainer.loggers, Path(cfg.run_dir) / "checkpoints", trainer.global_step)
        report(Path(cfg.run_dir), metrics)
    return metrics


def prepare(cfg: DictConfig) -> tuple[Trainer, Framework, DataModule]:
    """All that `run` needs, ready for `Trainer.fit`."""
    check(cfg)
    check_machine(cfg.trainer)
    seed_everything(cfg.seed, workers=True, verbose=False)
    datamodule = build_datamodule(cfg)
    source = datamodule.source
    robots = robots_of(source)
    with built_in_parts(cfg):
        framework = build_framework(cfg, build_spec(cfg, source), robots)
    if cfg.get("param_groups"):
        framework.param_groups = build(cfg.param_groups, "param_groups")
    datamodule.configure(
        horizon=framework.horizon,
        obs_steps=framework.obs_steps,
        action_offset=framework.action_offset,
        make_processor=lambda: framework.processor,
        goals=framework.wants_goals,
        representation=framework.robots.representation,
        token_lengths=getattr(framework, "token_lengths", None),
    )
    for name, augmentation in datamodule.augmentations.items():
        if getattr(augmentation, "drops_cameras", False) and not framework.masks_cameras:
            raise LibrobotError(
                f"augmentation.{name}: framework {type(framework).__name__} cannot act without one of its "
                f"cameras; leave this augmentation out"
            )
    if cfg.ckpt:
        check_checkpoint(Path(cfg.ckpt), framework)
    else:
        if not framework.has_teacher:  # a teacher's statistics come with its weights
            framework.normalizer.fit(datamodule.statistics)
        if framework.head.needs_fit and robots is not None:
            raise LibrobotError(
                f"head {type(framework.head).__name__} is fitted to the actions of one robot, and the "
                f"mixture has {len(robots)}; take another head, or give its datasets one robot "
                "(data.source.fields.NAME.embodiment)"
            )
        if framework.head.needs_fit:
            framework.head.fit(framework.normalized_chunks(datamodule.action_chunks()))
    plain = resolve(cfg)
    framework.attach_run(config=plain, provenance=source.provenance)
    trainer = build_trainer(cfg)
    if isinstance(source, Mixture):
        trainer.callbacks.append(DatasetShares(source.names))  # type: ignore[attr-defined]
    if cfg.objective and (Path(cfg.run_dir) / JOB).exists():
        trainer.loggers.append(Reports(Path(cfg.run_dir), cfg.objective))
    for logger in trainer.loggers:
        logger.log_hyperparams(plain)
    return trainer, framework, datamodule


def final_metrics(trainer: Trainer) -> dict[str, float]:
    """The last value of everything that was logged, the number of optimiser steps, and, where a timer runs,
    the seconds of training."""
    values: dict[str, Any] = {**trainer.callback_metrics, "step": trainer.global_step}
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    if timers:
        values["train_seconds"] = timers[0].time_elapsed("train")
    return {
        name: float(value.item() if isinstance(value, torch.Tensor) else value)
        for name, value in sorted(values.items())
    }


def report(run_dir: Path, metrics: dict[str, float]) -> None:
    """Write metrics.json and say where everything is."""
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    target = run_dir / "metrics.json"
    partial = target.with_name(f".{target.name}.tmp")
    partial.write_text(json.dumps(finite, indent=2))
    partial.replace(target)
    last = run_dir / "checkpoints" / "last.ckpt"
    print(f"run directory: {run_dir}")
    print(f"last checkpoint: {last if last.exists() else 'none (callbacks without checkpoints)'}")
    print("final metrics: " + ", ".join(f"{name} {value:.5g}" for name, value in metrics.items()), flush=True)
