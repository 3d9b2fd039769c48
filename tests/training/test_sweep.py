"""Jobs of a sweep, each data parallel in two processes: one run directory per job, and nothing else."""

import json

import pytest
import torch
import yaml
from small_runs import FRAMES, losses, tiny, train

import tiny_models
from librobot.training.sweeps.jobs import read_job

pytestmark = pytest.mark.slow


def test_a_sweep_of_data_parallel_jobs_gives_one_run_directory_each(dataset, tmp_path):
    arguments = [*tiny(), f"data.root={dataset}", "-m", "seed=1,2", "trainer=ddp"]
    arguments += ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_steps=2"]
    done = train(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = sorted(path.parent for path in tmp_path.rglob("config.yaml"))
    assert [run.name for run in runs] == ["0", "1"]
    assert {path for path in tmp_path.glob("outputs/*/*/*/*") if path.is_dir()} == set(runs)
    for run, seed in zip(runs, (1, 2), strict=True):
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["seed"] == config["data"]["seed"] == seed
        assert config["trainer"]["devices"] == 2
        assert "${" not in (run / "config.yaml").read_text()
        checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 2
        assert checkpoint["librobot"]["config"]["seed"] == seed
        place = checkpoint["DataModule"]
        assert (place["batches"], place["global_batch_size"]) == (2, 8)
        assert place["num_samples"] == FRAMES
        assert len(losses(run)) == 2
        assert json.loads((run / "metrics.json").read_text())["step"] == 2
    assert not set(losses(runs[0])) & set(losses(runs[1]))


def test_a_failing_job_does_not_stop_the_sweep_but_fails_it(dataset, tmp_path):
    arguments = [*tiny(), f"data.root={dataset}", "-m", "framework.width=33,32", "trainer.max_steps=1"]
    done = train(*arguments, "run_dir=runs", cwd=tmp_path)
    assert done.returncode == 1
    assert "job 0 failed" in done.stderr
    assert not (tmp_path / "runs/0/checkpoints").exists()
    assert (tmp_path / "runs/1/checkpoints/last.ckpt").exists()


@pytest.mark.timeout(3600)  # a process for each head, one after another
def test_a_sweep_over_all_heads_trains_what_fits_and_says_why_the_rest_does_not(dataset, tmp_path):
    arguments = [*tiny("pi0"), f"data.root={dataset}", "-m", "head=glob(*)", "trainer.max_steps=1"]
    done = train(*arguments, "run_dir=runs", cwd=tmp_path, timeout=3500)
    assert done.returncode == 1
    heads = tiny_models.options("head")  # the order of Hydra's glob
    trained = {h for i, h in enumerate(heads) if (tmp_path / f"runs/{i}/checkpoints/last.ckpt").exists()}
    students = {head for head in heads if "teacher" in tiny_models.load("head", head)}
    fitting = {head for head in heads if tiny_models.fits("pi0", head)}
    assert trained == fitting - students, done.stderr[-4000:]
    assert len(trained) >= 10
    wrong = {head: read_job(tmp_path / f"runs/{i}").error or "" for i, head in enumerate(heads)}
    assert {h for h in heads if "; take framework=custom network=" in wrong[h]} == set(heads) - fitting
    assert {h for h in heads if "head.teacher=CHECKPOINT" in wrong[h]} == students
    assert all(error.strip() in done.stderr for error in wrong.values())
