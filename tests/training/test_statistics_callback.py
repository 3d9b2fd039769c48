"""Errors by dimension, gradient norms and speed: against numbers computed by hand."""

import time
from types import SimpleNamespace

import pytest
import torch
from small_runs import fit, rows
from two_robots import TwoRobots

from librobot.errors import LibrobotError
from librobot.training.callbacks.statistics import ActionErrors, GradientNorms, Throughput

WITH = ["callbacks=[default,statistics]"]
WITH += [f"callbacks.{name}.every_n_steps=2" for name in ("gradients", "losses", "activations")]


def test_a_run_logs_them_only_when_asked(dataset, tmp_path):
    options = [
        "trainer.max_steps=4",
        "data.val_fraction=0.25",
        "trainer.log_every_n_steps=2",
        "data.batch_size=12",
    ]
    fit(dataset, tmp_path / "with", *WITH, *options)
    fit(dataset, tmp_path / "without", *options)
    ours, plain = rows(tmp_path / "with"), rows(tmp_path / "without")
    extra = set(ours[0]) - set(plain[0])
    assert {"val/error/x", "val/error/y", "speed/data_wait", "grad_norm/vlm", "grad_norm/all"} <= extra
    assert {"train/dim_loss/x", "activations/encoder.layers.0/std"} <= extra
    kinds = ("val/error/", "speed/", "grad_norm/", "train/dim_loss/", "activations/")
    assert all(name.startswith(kinds) for name in extra)
    assert [row["train/loss"] for row in ours] == [row["train/loss"] for row in plain]
    row = next(row for row in ours if row["grad_norm/all"])
    parts = [float(v) for n, v in row.items() if n.startswith("grad_norm/") and n != "grad_norm/all" and v]
    assert float(row["grad_norm/all"]) == pytest.approx(sum(part**2 for part in parts) ** 0.5, rel=1e-4)
    assert 0 <= float(row["speed/data_wait"]) < 1
    assert float(row["speed/samples_per_second"]) > 0


def test_errors_are_means_of_each_robots_real_dimensions():
    policy = TwoRobots()
    errors = ActionErrors()
    errors.on_validation_epoch_start(SimpleNamespace(), policy)
    target = torch.zeros(3, 2, 2)
    sampled = torch.tensor([[[1.0, 9.0], [3.0, 9.0]], [[5.0, 6.0], [9.0, 9.0]], [[7.0, 8.0], [9.0, 9.0]]])
    real = torch.tensor([[[1, 0], [1, 0]], [[1, 1], [0, 0]], [[1, 1], [0, 0]]]).bool()
    outputs = {"sampled": sampled, "target": target, "real": real}
    outputs |= {"sampled_normalized": -sampled / 2, "target_normalized": target}
    batch = SimpleNamespace(observation=torch.tensor([0, 1, 1]))
    errors.on_validation_batch_end(SimpleNamespace(), policy, outputs, batch, 0)
    errors.on_validation_epoch_end(SimpleNamespace(world_size=1), policy)
    assert policy.logged == {
        "val/error/arm/lift": 2.0,
        "val/error/hand/open": 6.0,
        "val/error/hand/turn": 7.0,
        "val/action_error/arm": 1.0,
        "val/action_error/hand": 3.25,
    }


def test_the_wait_for_data_is_measured_and_pauses_are_not():
    speed, logged = Throughput(), {}
    module = SimpleNamespace(log=logged.__setitem__)
    batch = SimpleNamespace(batch_size=4)

    def step(number, every):
        trainer = SimpleNamespace(global_step=number, log_every_n_steps=every, world_size=2)
        speed.on_train_batch_start(trainer, module, batch, 0)
        time.sleep(0.02)
        speed.on_train_batch_end(trainer, module, None, batch, 0)

    step(1, 3)
    time.sleep(0.06)  # the data
    step(2, 3)
    speed.on_save_checkpoint(None, module, {})
    time.sleep(0.3)
    step(3, 3)
    assert logged["speed/data_wait"] == pytest.approx(0.5, abs=0.1)
    assert logged["speed/samples_per_second"] == pytest.approx(12 * 2 / 0.12, rel=0.2)


def test_steps_that_are_not_logged_are_refused(dataset, tmp_path):
    with pytest.raises(LibrobotError, match=r"multiple of trainer\.log_every_n_steps \(2\).*found 3"):
        fit(dataset, tmp_path, *WITH, "callbacks.gradients.every_n_steps=3", "trainer.log_every_n_steps=2")
    with pytest.raises(ValueError, match="at least 1, found 0"):
        GradientNorms(0)
