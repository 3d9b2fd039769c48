"""The study's sweep, with a smaller budget, over Ray's workers and over submitit's local executor."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from small_runs import rows, start, train

from librobot.training.sweeps.jobs import read_job, read_reports
from librobot.training.sweeps.report import report
from librobot.training.sweeps.table import read_sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]
JOBS, STEPS = 5, 40
LAUNCHERS = {
    "ray": ["hydra/launcher=ray", "hydra.launcher.workers=2"],
    "submitit_local": ["hydra/launcher=submitit_local"],
}
BUDGET = ["data.source.episodes=8", "data.batch_size=8", f"trainer.max_steps={STEPS}"]
BUDGET += ["trainer.log_every_n_steps=1", "callbacks.checkpoints.every_n_steps=1"]
BUDGET += ["callbacks.rollouts.every_n_steps=20", "callbacks.rollouts.episodes=2"]
BUDGET += [f"hydra.sweeper.n_trials={JOBS}", "hydra.sweeper.n_jobs=2"]


def killed_and_gone_on_with(launcher, tmp_path):
    """The folder of a sweep whose command was killed while its third and fourth job trained.

    Only the command: jobs that a cluster's scheduler has would go on, and so do submitit's here.
    """
    folder = tmp_path / launcher
    arguments = ["-m", "experiment=sweep_demo/act", f"run_dir={launcher}", f"data.root={tmp_path}/demos"]
    arguments += [*BUDGET, *LAUNCHERS[launcher]]
    process = start(*arguments, cwd=tmp_path)
    deadline = time.monotonic() + 1800
    while not read_reports(folder / "2"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [read_job(folder / name).status for name in "01"] == ["finished", "finished"]
    ended = {name: (folder / name / "metrics.json").stat().st_mtime_ns for name in "01"}
    done = train(*arguments, cwd=tmp_path, timeout=1800)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on with 2 unfinished jobs" in done.stdout
    assert ended == {name: (folder / name / "metrics.json").stat().st_mtime_ns for name in "01"}
    return folder


def test_the_studys_sweep_over_each_launcher_is_the_same_one_also_when_it_is_killed(tmp_path):
    for needed in ("optuna", "ray", "submitit", "mujoco"):
        pytest.importorskip(needed)
    (tmp_path / "experiments").symlink_to(Path(__file__).parents[2] / "experiments")
    found = {}
    for launcher in LAUNCHERS:
        folder = killed_and_gone_on_with(launcher, tmp_path)
        sweep = read_sweep(folder)
        assert sweep.objective == "eval/success"
        assert [row.job.status for row in sweep.rows] == ["finished"] * JOBS
        for row in sweep.rows:
            steps = [int(each["step"]) for each in rows(row.run_dir) if each["train/loss"]]
            assert steps == list(range(STEPS))
        metrics = [json.loads((row.run_dir / "metrics.json").read_text()) for row in sweep.rows]
        losses = [each["train/loss"] for each in metrics]
        found[launcher] = [
            (row.values, row.value, loss) for row, loss in zip(sweep.rows, losses, strict=True)
        ]
        assert f"{JOBS} jobs: {JOBS} finished" in report(folder).read_text()
    assert found["ray"] == found["submitit_local"]
