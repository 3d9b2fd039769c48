"""Sweeps of real jobs: over each launcher, killed half-way, pruned while they train."""

import json
import os
import signal
import time

import pytest
from small_runs import start, tiny, train

from librobot.training.sweeps.jobs import read_job, read_reports
from librobot.training.sweeps.table import read_sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra/launcher=submitit_local"],
    "ray": ["hydra/launcher=ray", "hydra.launcher.workers=2"],
}
NEEDS = {"joblib": "hydra_plugins.hydra_joblib_launcher", "submitit_local": "submitit", "ray": "ray"}


def statuses(folder):
    return [row.job.status for row in read_sweep(folder, "train/loss").rows]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_same_sweep_over_each_launcher_with_a_job_that_fails(launcher, dataset, tmp_path):
    if launcher in NEEDS:
        pytest.importorskip(NEEDS[launcher])
    arguments = [*tiny(), f"data.root={dataset}", "-m", "framework.width=33,32", "run_dir=runs"]
    arguments += ["objective=train/loss", "trainer.max_steps=2", *LAUNCHERS[launcher]]
    done = train(*arguments, cwd=tmp_path, timeout=1500)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "job 0 failed" in done.stderr
    assert statuses(tmp_path / "runs") == ["failed", "finished"]
    failed, finished = (read_job(tmp_path / f"runs/{number}") for number in (0, 1))
    assert "width must be a multiple of num_heads" in failed.error
    metrics = json.loads((tmp_path / "runs/1/metrics.json").read_text())
    assert finished.value == metrics["train/loss"]
    assert (tmp_path / "runs/1/checkpoints/last.ckpt").exists()


@pytest.mark.parametrize("launcher", ["basic", "ray"])
def test_an_optuna_sweep_killed_half_way_goes_on(launcher, dataset, tmp_path):
    pytest.importorskip("optuna")
    if launcher in NEEDS:
        pytest.importorskip(NEEDS[launcher])
    folder, several = tmp_path / "sweep", 1 if launcher == "basic" else 2
    arguments = [*tiny(), f"data.root={dataset}", "-m", "hydra/sweeper=optuna", "run_dir=sweep"]
    arguments += ["objective=train/loss", "hydra.sweeper.n_trials=4", f"hydra.sweeper.n_jobs={several}"]
    arguments += ["optim.lr=tag(log,interval(1e-4,1e-2))", "framework.width=32,64", *LAUNCHERS[launcher]]
    arguments += ["trainer.max_steps=60", "callbacks.checkpoints.every_n_steps=1"]
    process = start(*arguments, cwd=tmp_path)
    deadline = time.monotonic() + 900
    while not read_reports(folder / str(several)):  # the job behind the first ones is training
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    broken = read_job(folder / str(several))
    written = {n: (folder / str(n) / "metrics.json").stat().st_mtime_ns for n in range(several)}
    done = train(*arguments, cwd=tmp_path, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert statuses(folder) == ["finished"] * 4
    assert read_job(folder / str(several)).overrides == broken.overrides
    assert written == {n: (folder / str(n) / "metrics.json").stat().st_mtime_ns for n in range(several)}
    assert "best: job" in done.stdout


def test_a_hopeless_job_is_ended_while_it_trains_and_keeps_its_checkpoint(dataset, tmp_path):
    pytest.importorskip("optuna")
    arguments = [*tiny(), f"data.root={dataset}", "data.val_fraction=0.25", "-m", "hydra/sweeper=optuna"]
    arguments += ["run_dir=sweep", "objective=val/loss", "optim.lr=1e-2,1e-9", "hydra.sweeper.n_trials=2"]
    arguments += ["hydra.sweeper.first=[{optim.lr:1e-2},{optim.lr:1e-9}]", "trainer.max_steps=3000"]
    arguments += [
        "hydra.sweeper.pruner.n_startup_trials=1",
        "trainer.max_time=00:00:01:00",
    ]
    done = train(*arguments, cwd=tmp_path, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "sweep"
    assert [read_job(folder / name).status for name in "01"] == ["finished", "pruned"]
    assert "job 1 pruned after step" in done.stdout
    assert (folder / "1/checkpoints/last.ckpt").exists()
    assert len(read_reports(folder / "1")) < len(read_reports(folder / "0"))


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("optim.lrr=1,2", "optim.lrr: there is no such key; did you mean 'lr'"),
        ("+optim.lrr=1,2", "optim.lrr: adamw has no argument 'lrr'; did you mean 'lr'"),
        ("framework=act,akt", "did you mean 'act'"),
    ],
)
@pytest.mark.parametrize("sweeper", ["basic", "optuna"])
def test_an_axis_with_an_unknown_key_is_refused_before_the_first_job(
    sweeper, axis, message, dataset, tmp_path
):
    arguments = [*tiny(), f"data.root={dataset}", "-m", f"hydra/sweeper={sweeper}", axis, "run_dir=runs"]
    done = train(*arguments, "objective=val/loss", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "run directory" not in done.stdout
    assert not list(tmp_path.rglob("job.json"))
