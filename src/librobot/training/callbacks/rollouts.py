"""Closed-loop success while training: episodes in the simulation every so many steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from omegaconf import OmegaConf

from librobot.config.build import build_suite
from librobot.evaluation.environment import suite_node, warn_of_rate, warn_of_renderer
from librobot.evaluation.episode import EpisodeResult
from librobot.evaluation.rollout import check_fit, evaluate_policy
from librobot.evaluation.statistics import summarise
from librobot.evaluation.video import write_videos
from librobot.evaluation.wandb_run import caption
from librobot.frameworks.base import Framework
from librobot.policy import Policy
from librobot.sim.base import Suite
from librobot.training.callbacks.checkpoints import is_last_step
from librobot.training.callbacks.ema import EMA
from librobot.training.callbacks.optimizer_steps import OptimizerStepCallback
from librobot.training.callbacks.statistics import Throughput
from librobot.training.trackers import show_videos


class Rollouts(OptimizerStepCallback):
    """Run `episodes` episodes every `every_n_steps` optimiser steps and at the last one; log `eval/success`,
    `eval/success/KIND` where there are several kinds, and `eval/seconds`.

    The scenes are the first of `librobot-eval seed=SEED`, the same every time, so that two values compare.
    `env` is a suite, or options in place of those that the demonstrations' own suite was recorded with; where
    the dataset names none, the run's `env=` is taken. The policy acts as a checkpoint of this step would:
    with the average of the weights where callbacks=[...,ema] keeps one. The metrics are in
    `trainer.callback_metrics` before any checkpoint of the step is taken, for `monitor=eval/success` and
    for pruning.

    With several processes the first runs the environments, and all of them answer for the policy: sharded
    weights need everyone. Training's random numbers are left as they were.

    `results` are the last evaluation's episodes; the first `videos_per_kind` of each kind keep their frames
    and are written to `folder`/step=NNNNNNNN/.
    """

    def __init__(
        self,
        folder: str,
        episodes: int = 20,
        every_n_steps: int = 1000,
        seed: int = 0,
        num_envs: int = 8,
        num_workers: int | None = None,
        kinds: Sequence[str] | None = None,
        execute_steps: int | None = None,
        num_steps: int | None = None,
        videos_per_kind: int = 0,
        env: Suite | Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (("episodes", episodes), ("every_n_steps", every_n_steps), ("num_envs", num_envs)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        if videos_per_kind < 0:
            raise ValueError(f"videos_per_kind must be at least 0, found {videos_per_kind}")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.num_steps = num_steps
        self.env = env
        self.options: dict[str, Any] = {
            "episodes": episodes,
            "seed": seed,
            "num_envs": num_envs,
            "num_workers": num_workers,
            "kinds": kinds,
            "execute_steps": execute_steps,
            "videos_per_kind": videos_per_kind,
        }
        self.suite: Suite | None = None
        self.results: list[EpisodeResult] = []
        self.evaluated_step = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Framework)
        origin = Origin(pl_module.run_config, pl_module.provenance)
        if self.env is not None and not isinstance(self.env, Mapping):
            self.suite = self.env
        else:
            options = dict(self.env or {})
            if not origin.provenance.get("env"):
                options = (origin.config.get("env") or {}) | options
            self.suite = build_suite(suite_node(OmegaConf.create(options), origin))
        with acting(trainer, pl_module) as policy:
            check_fit(policy, self.suite)
        if trainer.is_global_zero:
            warn_of_renderer(origin.provenance.get("renderer"), self.suite.renderer)
            learnt = pl_module.robots.own_union.control_hz
            warn_of_rate(learnt, self.suite.spec.control_hz, origin.provenance)

    def on_optimizer_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if step % self.every_n_steps == 0 or is_last_step(trainer):
            self.evaluate(trainer, pl_module)

    def evaluate(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Run the episodes and log what came of them; every process of the run has to call this."""
        started = time.monotonic()
        assert isinstance(pl_module, Framework)
        with acting(trainer, pl_module) as policy:
            policy.num_steps = self.num_steps
            values = self.lead(trainer, policy) if trainer.is_global_zero else answer(policy)
        values = shared(values, trainer)
        values["eval/seconds"] = time.monotonic() - started
        self.evaluated_step = trainer.global_step
        for name, value in values.items():
            pl_module.log(name, value, logger=False)  # for callbacks and metrics.json, at any step
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                callback.ended = None  # the time of the episodes is nobody's wait for data
        if trainer.is_global_zero and trainer.progress_bar_callback is not None:
            trainer.progress_bar_callback.print(
                f"step {trainer.global_step}: eval/success {values['eval/success']:.3g} in "
                f"{len(self.results)} episodes, {values['eval/seconds']:.0f} s"
            )
        return values

    def lead(self, trainer: Trainer, policy: Policy) -> dict[str, float]:
        """The first process: environments and statistics. What fails here ends every process."""
        assert self.suite is not None
        leader = Leader(policy, alone=trainer.world_size == 1)
        try:
            self.results = evaluate_policy(leader, self.suite, progress=False, **self.options)
        finally:
            leader.send(None)
        if any(result.frames for result in self.results):
            folder = self.folder / f"step={trainer.global_step:08d}"
            paths = write_videos(self.results, folder, self.suite.spec.control_hz)
            self.show(trainer, paths)
        summary = summarise(self.results)
        values = {"eval/success": float(summary["success"])}
        if len(summary["tasks"]) > 1:
            values |= {f"eval/success/{kind}": float(t["success"]) for kind, t in summary["tasks"].items()}
        return values

    def show(self, trainer: Trainer, paths: Mapping[int, Path]) -> None:
        """Give the videos to the loggers, numbered within their kind of task."""
        assert self.suite is not None
        videos: dict[str, tuple[Path, str]] = {}
        for result in self.results:
            if result.index in paths:
                number = sum(name.startswith(f"{result.kind}/") for name in videos)
                videos[f"{result.kind}/{number}"] = (paths[result.index], caption(result))
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        show_videos(trainer.loggers, videos, step, self.suite.spec.control_hz)


class Origin:
    """Where the policy's data are from, as `librobot.evaluation.environment` asks for it."""

    def __init__(self, config: dict[str, Any], provenance: dict[str, Any]) -> None:
        self.config, self.provenance = config, provenance


class Leader:
    """The policy, answering together with the processes that are in `answer`."""

    def __init__(self, policy: Policy, *, alone: bool) -> None:
        self.policy, self.alone = policy, alone
        self.spec, self.horizon, self.obs_steps = policy.spec, policy.horizon, policy.obs_steps

    def infer_batch(self, observations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self.send(observations)
        return self.policy.infer_batch(observations)

    def send(self, observations: list[dict[str, Any]] | None) -> None:
        """Hand the others their next observations; None sends them home."""
        if not self.alone:
            dist.broadcast_object_list([observations], src=0)


def answer(policy: Policy) -> dict[str, float]:
    """A process that is not the first: run the network on what it is sent, until nothing comes any more."""
    while True:
        received: list[Any] = [None]
        dist.broadcast_object_list(received, src=0)
        if received[0] is None:
            return {}
        policy.infer_batch(received[0])


def shared(values: dict[str, float], trainer: Trainer) -> dict[str, float]:
    """The first process's values, in all of them."""
    if trainer.world_size == 1:
        return values
    box = [values]
    dist.broadcast_object_list(box, src=0)
    return dict(box[0])


@contextmanager
def acting(trainer: Trainer, framework: Framework) -> Iterator[Policy]:
    """The framework as a policy, as it stands; what it was in training is put back behind it."""
    training = {module: module.training for module in framework.modules()}
    trains = [parameter for parameter in framework.parameters() if parameter.requires_grad]
    averages = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]
    devices = [framework.device] if framework.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for average in averages:
            average.put_in(framework)
        try:
            yield Policy(framework, config=framework.run_config, provenance=framework.provenance)
        finally:
            for average in averages:
                average.take_out(framework)
            for module, mode in training.items():
                module.training = mode
            for parameter in trains:
                parameter.requires_grad_(True)
