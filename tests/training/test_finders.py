"""The range test over learning rates and the largest batch that fits."""

import json
import re
from types import SimpleNamespace

import pytest
from omegaconf import open_dict
from small_runs import tiny, train

from librobot.config.compose import compose, read, write
from librobot.errors import LibrobotError
from librobot.training import finders
from librobot.training.estimates import before
from librobot.training.estimates.estimate import estimate


def configuration(dataset, run_dir, *overrides):
    own = [f"data.root={dataset}", f"run_dir={run_dir}", "name=tiny"]
    return read(write(compose([*tiny(), *own, *overrides]), run_dir / "config.yaml"))


def test_a_learning_rate_between_too_small_and_too_large(dataset, tmp_path, capsys):
    cfg = configuration(dataset, tmp_path)
    best = finders.find_lr(cfg, trials=40)
    assert 1e-6 < best < 0.5
    found = json.loads((tmp_path / "lr.json").read_text())
    assert found["suggestion"] == best
    assert min(found["lr"]) < 1e-6
    assert (tmp_path / "lr.png").stat().st_size > 5000
    assert f"optim.lr={best:.3g}" in capsys.readouterr().out
    assert not list(tmp_path.glob(".lr_find*"))  # what Lightning keeps the weights in
    assert {path.name for path in tmp_path.iterdir()} >= {"lr.json", "lr.png", "config.yaml"}


def test_the_largest_batch_that_fits(monkeypatch, capsys):
    cfg = compose([*tiny(), "trainer.accelerator=cpu"])

    def estimated(cfg, devices):
        size = cfg.data.batch_size  # beyond 150 a little more than a line
        device = SimpleNamespace(peak=1e6 + 2e5 * size + (1e6 if size > 150 else 0))
        return SimpleNamespace(devices=[device])

    monkeypatch.setattr(finders, "estimate", estimated)
    monkeypatch.setattr(before, "host_memory", lambda: 0.02)
    assert finders.find_batch_size(cfg) == 85  # of (18 - 1) / 0.2
    monkeypatch.setattr(before, "host_memory", lambda: 0.04)
    size = finders.find_batch_size(cfg)
    assert 150 < size < 175
    assert estimated(cfg, None).devices[0].peak <= 0.9 * 0.04e9
    assert f"data.batch_size={size} takes" in capsys.readouterr().out
    monkeypatch.setattr(before, "host_memory", lambda: 1e-6)
    with pytest.raises(LibrobotError, match="one sample takes"):
        finders.find_batch_size(cfg)


@pytest.mark.slow
def test_the_largest_batch_that_fits_by_real_estimates(dataset, tmp_path, monkeypatch):
    cfg = configuration(dataset, tmp_path, "trainer.accelerator=cpu")
    free = 0.04
    monkeypatch.setattr(before, "host_memory", lambda: free)
    size = finders.find_batch_size(cfg)
    assert size > 4
    peaks = []
    for number in (size, round(1.1 * size) + 1):
        with open_dict(cfg):
            cfg.data.batch_size = number
        peaks.append(estimate(cfg).cost.peak / 1e9)
    assert peaks[0] <= 0.9 * free < peaks[1]


@pytest.mark.slow
def test_the_command_prints_a_learning_rate_and_trains_nothing_else(dataset, tmp_path):
    done = train("--find-lr", *tiny(), f"data.root={dataset}", "run_dir=found", "name=tiny", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    best = json.loads((tmp_path / "found/lr.json").read_text())["suggestion"]
    assert f"optim.lr={best:.3g} is where the loss falls most steeply; " in done.stdout
    assert (tmp_path / "found/lr.png").stat().st_size > 5000
    assert not list(tmp_path.rglob("*.ckpt"))
    again = train("--find-lr", "trainer.devices=2", *tiny(), f"data.root={dataset}", cwd=tmp_path)
    assert again.returncode != 0
    assert "--find-lr: expected trainer.devices=1" in again.stderr


@pytest.mark.slow
def test_the_command_prints_a_batch_size_that_fits(dataset, tmp_path):
    """Of a policy that needs megabytes for each sample: hundreds of samples fit, not millions."""
    large = ["vlm.image_size=256", "vlm.tower.channels=64", "vlm.tower.num_blocks=4"]
    given = [*tiny(), *large, f"data.root={dataset}", "trainer.accelerator=cpu"]
    done = train("--find-batch-size", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.search(
        r"data\.batch_size=(\d+) takes ([\d.e+]+) GB of ([\d.e+]+) GB that are free", done.stdout
    )
    assert found, done.stdout
    assert int(found[1]) > 1
    assert float(found[2]) <= 0.9 * float(found[3])
    assert not list(tmp_path.rglob("*.ckpt"))
