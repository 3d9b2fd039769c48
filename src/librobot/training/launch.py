"""From a composed configuration to a training process: run directory, resolved config.yaml, fresh process.

Every job runs as `python -m librobot.training.worker RUN_DIR/config.yaml`. Lightning starts the processes of
further devices from that same command, so a sweep never replays its own command line, and no state leaks
from one job of a sweep to the next. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from librobot.config.compose import resolve, write
from librobot.config.schema import TrainConfig, check_root
from librobot.errors import LibrobotError
from librobot.training.sweeps import jobs
from librobot.training.sweeps.locks import in_turn

RUNS = Path("outputs/train")
LAST = Path("checkpoints/last.ckpt")


class JobFailed(LibrobotError):
    """A job of a sweep ended with an error, which it has already printed."""

    exit_code = 1


def launch(cfg: DictConfig) -> float | None:
    """Run one training job to its end, called by Hydra with the composed configuration.

    Returns the metric named by `objective` for Hydra's sweepers, None where none is named. Exits with the
    worker's exit code when a single job fails; a sweep goes on with its next job and fails at its end.
    """
    state = HydraConfig.get()
    is_sweep = state.mode == RunMode.MULTIRUN
    check_root(cfg, TrainConfig)
    resolve(cfg)  # what is missing is said before any folder is made
    number = str(state.job.num) if is_sweep else None
    asked = cfg.ckpt
    with open_dict(cfg):
        cfg.name = cfg.name or default_name(state.runtime.choices)
        place(cfg, number, os.path.relpath(state.runtime.output_dir) if is_sweep else None)
    print(f"run directory: {cfg.run_dir}", flush=True)
    if not is_sweep:
        code, _ = train(cfg)
        if code != 0:
            raise SystemExit(code)
        return objective(cfg) if cfg.objective else None
    with in_turn(Path(cfg.run_dir)) as (lock, waited):
        if waited:  # there is more now to go on from
            cfg.ckpt = asked
            place(cfg)
        return launch_job(cfg, state.job.num, list(state.overrides.task), lock)


def launch_job(cfg: DictConfig, number: int, overrides: list[str], lock: int) -> float | None:
    """One job of a sweep: what `launch` does, with a note of what became of it in its run directory.

    Its training process keeps the file descriptor `lock` (see `sweeps.locks`).
    """
    run_dir = Path(cfg.run_dir)
    job = jobs.begin(run_dir, number, overrides, cfg.objective, done=is_done(cfg))
    code, errors = train(cfg, prune=run_dir / jobs.PRUNE, keep=(lock,))
    if (run_dir / jobs.PRUNE).exists() and is_finished(cfg):
        code = 0  # it came to its end before it was told to stop
    interrupted = code in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    if interrupted and (run_dir / jobs.PRUNE).exists():
        job.end(run_dir, "pruned", exit_code=code)
        print(f"job {number} pruned {(run_dir / jobs.PRUNE).read_text().strip()}", flush=True)
        return None
    if interrupted:
        job.end(run_dir, "interrupted", exit_code=code)
        raise SystemExit(code)  # a sweep's later jobs are not wanted either
    if code != 0:
        job.end(run_dir, "failed", exit_code=code, error=errors or f"exit code {code}")
        raise JobFailed(f"job {number} failed with exit code {code}, {cfg.run_dir}: {errors or 'no message'}")
    try:
        value = objective(cfg) if cfg.objective else None
    except LibrobotError as error:
        job.end(run_dir, "failed", exit_code=0, error=str(error))
        raise
    job.end(run_dir, "finished", exit_code=0, value=value)
    return value


def train(cfg: DictConfig, prune: Path | None = None, keep: Sequence[int] = ()) -> tuple[int, str]:
    """Run the training process to its end; its exit code and what it said went wrong."""
    if is_done(cfg):
        print("this run has come to its end already; its last checkpoint is there", flush=True)
        return 0, ""
    config = write(cfg, Path(cfg.run_dir) / "config.yaml")
    code = run_process(worker_command(cfg, config), prune, keep)
    notes = sorted(Path(cfg.run_dir).glob(".failed-*"))
    errors = "\n".join(note.read_text() for note in notes)
    for note in notes:
        note.unlink(missing_ok=True)
    run_dir = Path(cfg.run_dir)
    if code > 128 and not errors and (run_dir / LAST).exists():  # it could not say so itself
        print(how_to_go_on(run_dir), file=sys.stderr)
    return code, errors


def how_to_go_on(run_dir: Path) -> str:
    last = run_dir / LAST
    if last.exists():
        return f"go on from {last}: the same command with run_dir={run_dir} ckpt=last"
    return "nothing was saved yet (callbacks.checkpoints.every_n_steps)"


def default_name(choices: Any) -> str:
    """A run is called after its experiment, else after its framework."""
    return str(choices.get("experiment") or choices["framework"]).replace("/", "_")


def place(cfg: DictConfig, job: str | None = None, job_dir: str | None = None) -> None:
    """Settle `run_dir` and `ckpt`.

    run_dir: as given (the jobs of a sweep in numbered folders below it, unless it holds an interpolation,
    such as ${name}, that tells them apart), else outputs/train/<date>/<time>_<name>, and
    outputs/multirun/<date>/<time>/<job> for a sweep.
    ckpt=auto: the last checkpoint in `run_dir` where there is one, else from the start: what is interrupted
    goes on when the same command is given again.
    ckpt=last: the last checkpoint in `run_dir` where that is given, else that of the newest run below
    outputs/train with the same `name`, which then goes on in its own directory.
    """
    given = cfg.run_dir
    tells_apart = given is not None and OmegaConf.is_interpolation(cfg, "run_dir")
    if cfg.ckpt == "auto" and given is None:
        raise LibrobotError(
            "ckpt=auto: expected run_dir=DIR beside it, where the run is or will be; found none"
        )
    if cfg.ckpt not in (None, "last", "auto"):
        cfg.ckpt = str(checkpoint_of(Path(cfg.ckpt)))
    if job is not None:
        cfg.run_dir = str(given if tells_apart else Path(given) / job) if given else job_dir
    elif given is None and cfg.ckpt == "last":
        cfg.run_dir = str(newest_run(cfg.name))
    elif given is None:
        cfg.run_dir = str(new_run_dir(cfg.name))
    last = Path(cfg.run_dir) / LAST
    if cfg.ckpt == "auto":
        cfg.ckpt = str(last) if last.exists() else None
    elif cfg.ckpt == "last":
        if not last.exists():
            raise LibrobotError(
                f"ckpt=last: expected {last}, which does not exist; leave ckpt out to start anew"
            )
        cfg.ckpt = str(last)
    elif cfg.ckpt is None and last.exists():
        raise LibrobotError(
            f"run_dir={cfg.run_dir} already holds a run ({last}); go on with it by ckpt=last, "
            f"name another run_dir, or remove it"
        )


def is_finished(cfg: DictConfig) -> bool:
    """Whether `run_dir` holds a run that made all of the steps that `cfg` asks for."""
    metrics = Path(cfg.run_dir) / "metrics.json"
    steps = cfg.trainer.get("max_steps", -1)
    return metrics.is_file() and 0 < steps <= json.loads(metrics.read_text()).get("step", 0)


def is_done(cfg: DictConfig) -> bool:
    """Whether the run that `cfg` goes on with leaves nothing to do."""
    return bool(cfg.ckpt) and is_finished(cfg)


def checkpoint_of(path: Path) -> Path:
    """`path` itself, or the last checkpoint of the run directory that it names."""
    found = path / LAST if (path / LAST).exists() else path
    if not found.exists() or (found / "config.yaml").exists():
        raise LibrobotError(
            f"ckpt={path}: expected a checkpoint, or a run directory that holds {LAST}; found none"
        )
    return found


def newest_run(name: str) -> Path:
    """The run below outputs/train called `name` whose last checkpoint is the youngest."""
    runs = {path.parent.parent: path.stat().st_mtime for path in RUNS.glob(f"*/*/{LAST}")}
    same = [run for run in runs if run.name.partition("_")[2] == name]
    if same:
        return max(same, key=lambda run: runs[run])
    others = ", ".join(str(run) for run in sorted(runs, key=lambda run: -runs[run])[:5])
    raise LibrobotError(
        f"ckpt=last: no run called {name!r} below {RUNS} has a checkpoint (a run is called after its "
        f"experiment or framework, or name=...); runs with a checkpoint: {others or 'none'}; name one "
        f"with run_dir=DIR or ckpt=PATH"
    )


def new_run_dir(name: str) -> Path:
    """outputs/train/<date>/<time>_<name>, numbered where another run started in the same second."""
    now = datetime.now()
    folder = RUNS / f"{now:%Y-%m-%d}"
    stems = (f"{now:%H-%M-%S}" + (f"-{number}" if number else "") for number in range(1000))
    for stem in stems:
        try:
            (folder / f"{stem}_{name}").mkdir(parents=True)
        except FileExistsError:
            continue
        return folder / f"{stem}_{name}"
    raise LibrobotError(f"{folder}: found no free name for a run called {name!r}")


def worker_command(cfg: DictConfig, config: Path) -> list[str]:
    """The command of the training process; inside a Slurm allocation `trainer=slurm` starts it by srun."""
    command = [sys.executable, "-m", "librobot.training.worker", str(config)]
    plugins = cfg.trainer.get("plugins") or []
    if not any("SLURMEnvironment" in str(plugin.get("_target_")) for plugin in plugins):
        return command
    if "SLURM_JOB_ID" not in os.environ:
        raise LibrobotError(
            "trainer=slurm: expected to run inside a Slurm job (sbatch or salloc), found no SLURM_JOB_ID; "
            "on a plain machine take trainer=ddp"
        )
    if "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise LibrobotError(
            "trainer=slurm: run librobot-train itself without srun; it starts its processes by srun"
        )
    nodes, devices = str(cfg.trainer.num_nodes), str(cfg.trainer.devices)
    return ["srun", f"--nodes={nodes}", f"--ntasks-per-node={devices}", *command]


def run_process(command: list[str], prune: Path | None = None, keep: Sequence[int] = ()) -> int:
    """Run `command` in its own session; SIGINT, SIGTERM and SIGHUP go on to it. Returns an exit code.

    A file at `prune` ends it as SIGTERM would; it inherits the file descriptors `keep`.
    """
    process = subprocess.Popen(command, start_new_session=True, pass_fds=keep)
    with forwarding(process):
        if prune is not None:
            end_when_there(prune, process)
        code = process.wait()
    if code != 0:
        end_group(process.pid)
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        print(f"the training process was ended by {name}{hint}", file=sys.stderr)
        return 128 - code
    return code


def end_when_there(prune: Path, process: subprocess.Popen) -> None:
    """Wait for `process`; SIGTERM to it, once, when the file `prune` appears."""
    while process.poll() is None:
        if prune.exists():
            process.send_signal(signal.SIGTERM)
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)


def end_group(group: int, patience: float = 10.0) -> None:
    """End what a failed training process left behind: processes of other devices, data workers."""
    deadline = time.monotonic() + patience
    number = int(signal.SIGTERM)
    with suppress(ProcessLookupError, PermissionError):
        while True:
            os.killpg(group, number)
            time.sleep(0.05)
            number = signal.SIGKILL if time.monotonic() > deadline else 0  # 0 only asks who is there


@contextmanager
def forwarding(process: subprocess.Popen) -> Iterator[None]:
    """Pass signals on to `process` for as long as the context lasts."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python only lets the main thread handle signals
        return
    translated = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, signal.SIGHUP: signal.SIGTERM}

    def forward(number: int, frame: Any) -> None:
        if process.poll() is None:
            process.send_signal(translated[signal.Signals(number)])

    before = {number: signal.signal(number, forward) for number in translated}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def objective(cfg: DictConfig) -> float:
    """The metric that a sweeper optimises, from the run's metrics.json."""
    metrics = json.loads((Path(cfg.run_dir) / "metrics.json").read_text())
    if cfg.objective not in metrics:
        raise LibrobotError(
            f"objective={cfg.objective}: the run logged no such metric; it logged {sorted(metrics)}"
        )
    return float(metrics[cfg.objective])
