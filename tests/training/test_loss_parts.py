"""The parts of the training loss: by hand, and in runs, where they make up the loss that is logged."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import fit, rows
from two_robots import TwoRobots

from librobot import losses
from librobot.errors import LibrobotError
from librobot.frameworks.rt2 import RT2
from librobot.training.callbacks.losses import LossParts

EVERY = ["callbacks=[default,statistics]", "callbacks.losses.every_n_steps=1"]


class Sums:
    """The strategy of two processes whose other one saw the same."""

    root_device = "cpu"

    @staticmethod
    def reduce(tensor, reduce_op):
        assert reduce_op == "sum"
        return 2 * tensor


def trainer(step, every=1):
    return SimpleNamespace(global_step=step, log_every_n_steps=every, strategy=Sums, world_size=2)


def run(callback, policy, *batches):
    """Each batch is (robots, what `compute_loss` computes, the optimiser steps that are then done)."""
    callback.on_fit_start(trainer(0), policy)
    done = 0
    for robots, compute, after in batches:
        batch = SimpleNamespace(observation=torch.tensor(robots), extra={})
        callback.on_train_batch_start(trainer(done), policy, batch, 0)
        compute()
        done = after
        callback.on_train_batch_end(trainer(done), policy, None, batch, 0)


@pytest.mark.parametrize(
    ("every", "steps_done"), [(2, (1, 2)), (1, (0, 1))]
)  # two steps, or two batches of one
def test_means_of_each_robots_real_dimensions(every, steps_done):
    policy, target = TwoRobots(), torch.zeros(2, 2, 2)
    steps = torch.tensor([[True, True], [True, False]])
    dims = torch.tensor([[[True, False]], [[True, True]]])
    first = torch.tensor([[[1.0, 99.0], [3.0, 99.0]], [[5.0, -7.0], [99.0, 99.0]]])
    second = torch.tensor([[[0.0, 99.0], [0.0, 99.0]], [[1.0, -1.0], [99.0, 99.0]]])

    def loss_of(found):
        return lambda: losses.reduce(losses.l1(found, target, steps[..., None] & dims), steps)

    batches = zip((first, second), steps_done, strict=True)
    run(LossParts(every), policy, *(([0, 1], loss_of(found), done) for found, done in batches))
    assert policy.logged == {
        "train/dim_loss/arm/lift": 1.0,
        "train/dim_loss/hand/open": 3.0,
        "train/dim_loss/hand/turn": 4.0,
        "train/robot_loss/arm": 1.0,
        "train/robot_loss/hand": 3.5,
    }
    whole = losses.Record()
    with losses.recorded(whole):
        loss = loss_of(first)()
    assert loss == sum(part.sum() for part, _ in whole.samples) / sum(by.sum() for _, by in whole.samples)


def test_a_robot_that_was_not_seen_and_a_loss_without_dimensions_log_nothing():
    policy, steps = TwoRobots(), torch.ones(1, 2, dtype=torch.bool)
    nats = lambda: losses.reduce(torch.tensor([2.5]), steps)  # noqa: E731
    with pytest.warns(UserWarning, match=r"loss of head Identity is no mean over numbers.*no train/dim_loss"):
        run(LossParts(1), policy, ([1], nats, 1))
    assert policy.logged == {"train/robot_loss/hand": 2.5}


def test_nothing_is_recorded_after_an_error():
    policy, callback = TwoRobots(), LossParts(1)
    callback.on_fit_start(trainer(0), policy)
    callback.on_train_batch_start(trainer(0), policy, None, 0)
    callback.on_exception(trainer(0), policy, RuntimeError())
    losses.mse(torch.ones(1, 1, 1), torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))
    assert callback.record.elements == []
    with pytest.raises(LibrobotError, match=r"callbacks\.losses\.every_n_steps must be a multiple"):
        LossParts(3).on_fit_start(trainer(0, every=2), policy)


def test_rt2s_dimensions_are_the_robots_again():
    policy = RT2.__new__(RT2)
    torch.nn.Module.__init__(policy)
    policy.order, policy.terminate = torch.tensor([2, 0, 1]), True
    values = torch.randn(2, 4, 3)
    assert torch.equal(policy.of_dimensions(policy.written(values, 0.5)), values)


def test_a_flows_dimensions_make_up_its_loss(dataset, tmp_path):
    fit(dataset, tmp_path, "trainer.max_steps=3", *EVERY, framework="pi0")
    assert len(rows(tmp_path)) == 3
    for row in rows(tmp_path):
        parts = [float(row[f"train/dim_loss/{dim}"]) for dim in "xy"]
        assert np.mean(parts) == pytest.approx(float(row["train/loss"]), rel=1e-5)
