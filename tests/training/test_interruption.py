"""librobot-train as a command: stopped by SIGTERM, gone on with, and quiet about what nobody can change."""

import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from small_runs import fit, rows, start, tiny, train

LAST = "checkpoints/last.ckpt"
NOISE = [
    "litlogger",
    "Tip",
    "was configured so",
    "weights_only",
    "You have overridden",
    "deprecated",
    "Warning",
]


@pytest.fixture(scope="module")
def interrupted(dataset, tmp_path_factory):
    """A run that got SIGTERM after some steps; its checkpoint; what it printed."""
    cwd = tmp_path_factory.mktemp("interrupted")
    arguments = [*tiny(), f"data.root={dataset}", "run_dir=run"]
    arguments += ["trainer.max_steps=1000000", "callbacks.progress.every_n_seconds=0.01"]
    process = start(*arguments, cwd=cwd)
    lines = [process.stdout.readline()]
    while lines[-1] and not lines[-1].startswith("step "):
        lines.append(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    return SimpleNamespace(
        run_dir=cwd / "run", arguments=arguments, code=process.returncode, out="".join(lines) + out, err=err
    )


@pytest.fixture(scope="module")
def checkpoint(interrupted):
    return torch.load(interrupted.run_dir / LAST, weights_only=True)


def test_sigterm_leaves_a_checkpoint_and_says_how_to_go_on(interrupted, checkpoint):
    assert interrupted.code == 128 + signal.SIGTERM
    assert checkpoint["global_step"] >= 1
    assert f"stopped by SIGTERM after step {checkpoint['global_step']}" in interrupted.err
    assert "ckpt=last" in interrupted.err
    assert "Traceback" not in interrupted.err
    assert {path.name for path in interrupted.run_dir.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "hparams.yaml",
        "metrics.csv",
    }


def test_the_output_holds_no_noise(interrupted):
    assert [word for word in NOISE if word in interrupted.out + interrupted.err] == []
    assert "GPU available" in interrupted.err  # what Lightning has to say about the machine still comes


def assert_goes_on_to(run_dir, stopped):
    assert [int(row["step"]) for row in rows(run_dir)] == list(range(stopped + 2))
    assert torch.load(run_dir / LAST, weights_only=True)["global_step"] == stopped + 2


def test_going_on_reaches_the_end_without_a_gap(interrupted, checkpoint, dataset, tmp_path):
    stopped = checkpoint["global_step"]
    assert [int(row["step"]) for row in rows(interrupted.run_dir)] == list(range(stopped))
    run_dir = shutil.copytree(interrupted.run_dir, tmp_path / "run")
    fit(dataset, run_dir, "ckpt=last", f"trainer.max_steps={stopped + 2}")
    assert_goes_on_to(run_dir, stopped)


@pytest.mark.slow
def test_going_on_by_the_command(interrupted, checkpoint, tmp_path):
    stopped = checkpoint["global_step"]
    run_dir = shutil.copytree(interrupted.run_dir, tmp_path / "run")
    done = train(*interrupted.arguments, "ckpt=last", f"trainer.max_steps={stopped + 2}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"step {stopped + 2}/{stopped + 2}" in done.stdout
    assert f"last checkpoint: run/{LAST}" in done.stdout
    assert_goes_on_to(run_dir, stopped)
