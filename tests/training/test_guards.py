"""A loss that is not a number ends the run; messages are filtered one by one."""

import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
from small_runs import fit

from librobot.training.callbacks.guards import Diverged, StopOnNaN
from librobot.training.quiet import LOGGER, WARNINGS, is_news, quieten


def test_a_diverging_run_stops_with_the_step_and_advice(dataset, tmp_path):
    with pytest.raises(Diverged, match=r"the loss is (nan|inf) at step (\d+); .*smaller optim\.lr") as caught:
        fit(dataset, tmp_path, "optim=sgd", "optim.lr=1e30", "trainer.max_steps=50")
    assert caught.value.exit_code == 1
    assert not (tmp_path / "metrics.json").exists()


def test_losses_that_are_not_on_the_cpu_are_looked_at_in_groups():
    guard = StopOnNaN(every_n_steps=3)
    broken = SimpleNamespace(detach=lambda: torch.tensor(float("nan")))
    guard.waiting = [(4, torch.tensor(1.0)), (5, broken.detach()), (6, torch.tensor(1.0))]
    with pytest.raises(Diverged, match="nan at step 5"):
        guard.on_save_checkpoint(None, None, {})
    assert guard.waiting == []
    guard.on_save_checkpoint(None, None, {})


def record(message):
    return logging.LogRecord(LOGGER, logging.INFO, "", 0, message, (), None)


def test_only_the_known_messages_are_filtered():
    assert not is_news(record("💡 Tip: try installing something"))
    assert not is_news(record("`Trainer(limit_train_batches=1.0)` was configured so 100% will be used.."))
    assert is_news(
        record("`Trainer(limit_train_batches=1)` was configured so 1 batch per epoch will be used.")
    )
    assert is_news(record("GPU available: True (cuda), used: True"))


def test_only_the_known_warnings_are_filtered():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logger = logging.getLogger(LOGGER)
        before = list(logger.filters)
        quieten()
        logger.filters = before
        warnings.warn("You have overridden `on_before_batch_transfer` in `LightningModule` but", UserWarning)
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use", FutureWarning)
        warnings.warn("You have overridden `on_after_batch_transfer` in `LightningModule` but", UserWarning)
    assert len(WARNINGS) == 2
    assert ["on_after_batch_transfer" in str(item.message) for item in caught] == [True]
