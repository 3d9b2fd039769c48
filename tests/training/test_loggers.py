"""Every logger's files can be read back, and hold what was trained."""

import pytest
import yaml
from conftest import fit, losses, rows

from librobot.training.loggers import CSVLogger


def test_tensorboard_events_read_back(dataset, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fit(dataset, tmp_path, "logger=tensorboard", "trainer.max_steps=2")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = events.Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == [0, 1]
    assert [scalar.value for scalar in scalars] == pytest.approx([float(loss) for loss in losses(tmp_path)])


def test_wandb_keeps_an_offline_run_that_reads_back(dataset, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    fit(dataset, tmp_path, "logger=wandb", "trainer.max_steps=2")
    wandb.finish()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert (tmp_path / "wandb_id").read_text() in file.name
    store = DataStore()
    store.open_for_scan(str(file))
    found = []
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        items = record.history.item
        values = {"/".join(item.nested_key) or item.key: yaml.safe_load(item.value_json) for item in items}
        found += [values["train/loss"]] if "train/loss" in values else []
    assert found == pytest.approx([float(loss) for loss in losses(tmp_path)])


def test_csv_goes_on_from_the_checkpoints_step_and_takes_new_columns(tmp_path):
    first = CSVLogger(str(tmp_path))
    for step in range(4):
        first.log_metrics({"loss": 10.0 + step}, step)
    first.finalize("success")
    resumed = CSVLogger(str(tmp_path), flush_every_n_rows=1)
    resumed.log_metrics({"loss": 22.0}, 2)
    resumed.log_metrics({"loss": 23.0}, 3)
    resumed.log_metrics({"error": 1.5}, 3)
    resumed.save()
    assert [(row["step"], row["loss"], row["error"]) for row in rows(tmp_path)] == [
        ("0", "10.0", ""),
        ("1", "11.0", ""),
        ("2", "22.0", ""),
        ("3", "23.0", "1.5"),
    ]


def test_csv_refuses_to_flush_never(tmp_path):
    with pytest.raises(ValueError, match="at least 1, found 0"):
        CSVLogger(str(tmp_path), flush_every_n_rows=0)
