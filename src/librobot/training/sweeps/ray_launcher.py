"""The jobs of a sweep on Ray's workers, each started there as on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from librobot.errors import LibrobotError, require


def launch(
    jobs: Sequence[Sequence[str]],
    first: int,
    *,
    hydra_context: HydraContext,
    task_function: TaskFunction,
    config: DictConfig,
    address: str | None,
    workers: int | None,
    num_cpus: int,
    num_gpus: float,
) -> list[JobReturn]:
    """Run jobs, given by their overrides and numbered from `first`; return when all have ended.

    A job whose worker or machine died has failed; the others go on.
    """
    ray = require("ray", "ray")
    setup_globals()
    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # without num_gpus all stay visible
        local = {"num_cpus": workers * num_cpus} if workers and address is None else {}
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=True, **local)
        except (ConnectionError, ValueError) as error:
            raise LibrobotError(f"hydra.launcher.address={address}: no Ray cluster there: {error}") from error
    remote = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=0)(run)
    context = ray.put((hydra_context, task_function, config, Singleton.get_state()))
    running = [
        remote.remote(context, first + i, list(job), os.getcwd(), num_cpus) for i, job in enumerate(jobs)
    ]
    return [_result(ray, reference, job) for reference, job in zip(running, jobs, strict=True)]


def run(context: Any, number: int, overrides: list[str], folder: str, threads: int) -> JobReturn:
    """One job, in a worker's process."""
    hydra_context, task_function, config, singletons = context
    os.chdir(folder)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    setup_globals()
    Singleton.set_state(singletons)
    job = hydra_context.config_loader.load_sweep_config(config, overrides)
    with open_dict(job):
        job.hydra.job.id = f"{job.hydra.job.name}_{number}"
        job.hydra.job.num = number
    HydraConfig.instance().set_config(job)
    return run_job(
        hydra_context=hydra_context,
        task_function=task_function,
        config=job,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def _result(ray: Any, reference: Any, overrides: Sequence[str]) -> JobReturn:
    try:
        return ray.get(reference)
    except (ray.exceptions.RayError, SystemExit) as error:
        lost = JobReturn(overrides=overrides, status=JobStatus.FAILED)
        lost.return_value = LibrobotError(f"a job's worker was lost: {str(error).splitlines()[0]}")
        return lost
