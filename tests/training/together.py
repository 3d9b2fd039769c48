"""Small runs in several processes: `python together.py STAGES.json` imports everything once and forks them.

A stage is {"count", "jobs"}, a job {"framework", "run_dir", "overrides"}; jobs run one after another, each in
`count` processes on the CPU. What `small_runs.fit` raises ends its job, and RUN_DIR/errorRANK.txt says it.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).parent
PRELOADED = [f"librobot.frameworks.{name}" for name in ("act", "pi0")]
PRELOADED += [
    f"librobot.training.callbacks.{name}"
    for name in ("activations", "ema", "losses", "rollouts", "statistics")
]
PRELOADED += ["librobot.data.sources.lerobot", "librobot.vlms.tiny", "librobot.heads.flow_matching"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def stage(count: int, jobs: list[dict]) -> dict:
    return {"count": count, "jobs": jobs}


def together(dataset: Path, folder: Path, stages: list[dict], *, timeout: float = 1500) -> None:
    """Run stages, one after another. Raises AssertionError where a process ends early."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "stages.json"
    file.write_text(json.dumps({"dataset": str(dataset), "stages": stages}, default=str))
    path = os.pathsep.join([*sys.path, str(HERE.parent / "evaluation")])
    done = subprocess.run(
        [sys.executable, str(HERE / "together.py"), str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": path},
        text=True,
        capture_output=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


def run_jobs(dataset: Path, jobs: list[dict], options: list[str], rank: int) -> None:
    from small_runs import fit

    from librobot.errors import LibrobotError

    for job in jobs:
        try:
            fit(dataset, Path(job["run_dir"]), *options, *job["overrides"], framework=job["framework"])
        except Exception as error:
            text = str(error) if isinstance(error, LibrobotError) else traceback.format_exc()
            Path(job["run_dir"], f"error{rank}.txt").write_text(text)


def forked(dataset: Path, count: int, jobs: list[dict]) -> bool:
    """Run jobs in `count` processes made from this one, which has run nothing; whether all came through."""
    port, children = str(free_port()), []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                options = ["trainer.accelerator=cpu", "trainer.precision=32-true", f"trainer.devices={count}"]
                if count > 1:
                    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_PORT=port)
                run_jobs(dataset, jobs, options, rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    came = True
    for _ in range(count):
        ended, status = os.wait()
        children.remove(ended)
        if status != 0:
            came = False
            for child in children:  # which would wait for the one that is gone
                os.kill(child, signal.SIGKILL)
    return came


def main(file: str) -> int:
    for module in ("small_runs", *PRELOADED):  # all that is heavy, once
        importlib.import_module(module)
    plan = json.loads(Path(file).read_text())
    for one in plan["stages"]:
        if not forked(Path(plan["dataset"]), one["count"], one["jobs"]):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
