"""Every logger's files can be read back, and hold what was trained."""

import os
import subprocess
import sys

import pytest
from small_runs import fit, losses, rows

from librobot.training.checkpoints import AtomicCheckpointIO
from librobot.training.loggers import CSVLogger, wandb_logger


def test_tensorboard_events_read_back(dataset, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fit(dataset, tmp_path, "logger=tensorboard", "trainer.max_steps=2")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = events.Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == [0, 1]
    assert [scalar.value for scalar in scalars] == pytest.approx([float(loss) for loss in losses(tmp_path)])


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """W&B as on a machine where nobody has an account."""
    module = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield module
    module.teardown()


def test_wandb_is_offline_without_an_account_and_goes_on_in_the_same_run(wandb, tmp_path):
    first, resumed = wandb_logger(str(tmp_path)), wandb_logger(str(tmp_path))
    assert first._offline
    assert first.version == resumed.version == (tmp_path / "wandb_id").read_text()
    assert not wandb_logger(str(tmp_path / "online"), offline=False)._offline


def log(logger, *entries):
    for step, metrics in entries:
        logger.log_metrics(metrics, step)


def test_csv_has_one_row_for_a_step_and_takes_new_columns(tmp_path):
    log(
        CSVLogger(str(tmp_path)),
        (0, {"loss": 1.0}),
        (1, {"loss": 2.0}),
        (1, {"error": 3.0}),
        (2, {"loss": 4.0}),
    )
    found = [(row["step"], row["loss"], row["error"]) for row in rows(tmp_path)]
    assert found == [("0", "1.0", ""), ("1", "2.0", "3.0"), ("2", "4.0", "")]


def test_csv_goes_on_from_the_checkpoints_step(tmp_path):
    log(CSVLogger(str(tmp_path)), *((step, {"loss": 10.0 + step}) for step in range(4)), (2, {"error": 1.0}))
    log(CSVLogger(str(tmp_path)), (2, {"loss": 22.0}), (3, {"loss": 23.0}))
    found = [(row["step"], row["loss"], row["error"]) for row in rows(tmp_path)]
    assert found == [("0", "10.0", ""), ("1", "11.0", ""), ("2", "22.0", "1.0"), ("3", "23.0", "")]


def test_csv_goes_on_behind_a_row_that_was_cut_short(tmp_path):
    log(CSVLogger(str(tmp_path)), *((step, {"loss": 10.0 + step}) for step in range(3)))
    with (tmp_path / "metrics.csv").open("a", newline="") as file:
        file.write("1")  # of 13
    log(CSVLogger(str(tmp_path)), (3, {"loss": 23.0}))
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)][1:] == [
        ("1", "11.0"), ("2", "12.0"), ("3", "23.0"),
    ]  # fmt: skip


def test_a_checkpoints_own_step_has_its_row_already(dataset, tmp_path, monkeypatch):
    """What was logged, whenever a checkpoint is written: a kill right then loses nothing."""
    seen = []
    write = AtomicCheckpointIO.write

    def look(self, checkpoint, target):
        seen.append((checkpoint["global_step"], rows(tmp_path)))
        write(self, checkpoint, target)

    monkeypatch.setattr(AtomicCheckpointIO, "write", look)
    options = ["callbacks.checkpoints.every_n_steps=2", "trainer.max_steps=4", "data.val_fraction=0.25"]
    fit(dataset, tmp_path, *options, "data.batch_size=18")
    end = rows(tmp_path)
    assert [step for step, _ in seen] == [2, 4]
    for step, found in seen:
        assert [row["step"] for row in found] == [str(n) for n in range(step)]
        assert [row["train/loss"] for row in found] == [row["train/loss"] for row in end[:step]]


def test_csv_of_a_run_that_starts_anew_holds_nothing_older(tmp_path):
    log(CSVLogger(str(tmp_path)), (0, {"other": 1.0}), (1, {"other": 1.0}))
    log(CSVLogger(str(tmp_path)), (0, {"loss": 2.0}))
    assert rows(tmp_path) == [{"step": "0", "loss": "2.0"}]


@pytest.mark.parametrize("stop", [2, 3])  # at a validation, after one
def test_validation_metrics_survive_a_stop(stop, dataset, tmp_path):
    options = ["data.val_fraction=0.25", "data.batch_size=18", "trainer.log_every_n_steps=2"]
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    fit(dataset, straight, *options, "trainer.max_steps=5")
    fit(dataset, parts, *options, f"trainer.max_steps={stop}")
    fit(dataset, parts, *options, "trainer.max_steps=5", "ckpt=last")
    assert [row["step"] for row in rows(straight) if row["val/loss"]] == ["1", "3"]
    assert rows(parts) == rows(straight)


def test_tensorboard_leaves_tensorflow_alone(tmp_path):
    """TensorBoard would import it where it is installed: seconds, and memory on the device."""
    pytest.importorskip("tensorboard")
    code = (
        "import sys; from librobot.training.loggers import tensorboard_logger; "
        f"logger = tensorboard_logger({str(tmp_path)!r}); logger.log_metrics({{'loss': 1.0}}, 0); "
        "logger.finalize('success'); sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert list(tmp_path.glob("events.*"))
