"""Hydra's seams for sweeps of librobot-train: `hydra/sweeper=optuna`, `hydra/launcher=ray`.

Hydra imports this module at every start and takes plugins from nowhere else, so it holds only the seams; what
they do is in `librobot.training.sweeps`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class OptunaSweeper(Sweeper):
    """Jobs whose values Optuna chooses; the options are those of conf/hydra/sweeper/optuna.yaml."""

    def __init__(self, params: DictConfig | None = None, **options: Any) -> None:
        self.params = dict(params or {})
        self.options = {key: _plain(value) for key, value in options.items()}
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from librobot.errors import LibrobotError, require

        require("optuna", "sweep")
        from librobot.training.sweeps.optuna_sweep import OptunaSweep
        from librobot.training.sweeps.space import parse

        assert self.config is not None
        assert self.launcher is not None
        assert self.hydra_context is not None
        if not self.config.objective:
            raise LibrobotError(
                "hydra/sweeper=optuna: expected objective=METRIC beside it, what the jobs are judged by; "
                "found none; take e.g. objective=val/loss with data.val_fraction=0.1"
            )
        if OmegaConf.is_interpolation(self.config, "run_dir"):
            raise LibrobotError(
                f"hydra/sweeper=optuna: expected run_dir=DIR, one folder for the sweep, its jobs numbered "
                f"below it, found {self.config.run_dir!r} from an interpolation"
            )
        given = [f"{key!s}={value}" for key, value in self.params.items()]
        space = parse([*given, *arguments], self.hydra_context.config_loader)
        self.validate_batch_is_legal(space.corners())
        launcher = self.launcher
        return OptunaSweep(
            Path(os.path.relpath(self.config.hydra.sweep.dir)),
            space,
            lambda jobs, first: launcher.launch(jobs, initial_job_idx=first),
            objective=self.config.objective,
            **self.options,
        ).run()


class RayLauncher(Launcher):
    """Jobs on Ray's workers; the options are those of conf/hydra/launcher/ray.yaml."""

    def __init__(self, address: str | None, workers: int | None, num_cpus: int, num_gpus: float) -> None:
        self.options: dict[str, Any] = {
            "address": address,
            "workers": workers,
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
        }
        self.given: dict[str, Any] = {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.given = {"hydra_context": hydra_context, "task_function": task_function, "config": config}

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from librobot.training.sweeps.ray_launcher import launch

        return launch(job_overrides, initial_job_idx, **self.given, **self.options)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
