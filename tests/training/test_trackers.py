"""One run with every tracker, read back: metrics, configuration, videos, checkpoints, the code's version."""

import os
from pathlib import Path

import pytest
import wandb_files
from small_runs import fit, rows
from stick_suite import StickSuite

from librobot.config.compose import compose
from librobot.evaluation import run as evaluation

pytestmark = pytest.mark.slow
wandb = pytest.importorskip("wandb")
SUITE = "{_target_: stick_suite.StickSuite}"
ROLLOUTS = ["episodes=2", "num_workers=1", "videos_per_kind=1", "every_n_steps=2", f"env={SUITE}"]


@pytest.fixture(scope="module")
def tracked(dataset, tmp_path_factory):
    """The folder of a run that was stopped after two steps and went on to four."""
    folder, patch = tmp_path_factory.mktemp("tracked"), pytest.MonkeyPatch()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        patch.delenv(name)
    for name in ("NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        patch.setenv(name, str(folder / name))
    patch.setenv("WANDB_SILENT", "true")
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    options = [f"callbacks.rollouts.{option}" for option in ROLLOUTS]
    options += [f"callbacks.{name}.every_n_steps=2" for name in ("gradients", "losses", "activations")]
    options += ["callbacks=[default,statistics,rollouts]", "logger=[wandb,tensorboard,mlflow]"]
    options += ["logger.wandb.project=stick", f"logger.mlflow.artifacts={folder}/mlflow"]
    run_dir = folder / "run"
    for steps in (2, 4):
        fit(dataset, run_dir, *options, f"trainer.max_steps={steps}", *(["ckpt=last"] if steps > 2 else []))
        wandb.finish()
    yield run_dir
    wandb.teardown()
    patch.undo()


@pytest.fixture(scope="module")
def offline(tracked):
    """The records of its two W&B files, of one run."""
    wandb.teardown()  # its service has closed the files only when it has ended
    files = sorted(tracked.glob("wandb/offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{(tracked / 'wandb_id').read_text()}.wandb"}
    assert len(files) == 2
    return [record for file in files for record in wandb_files.records(file)]


def test_wandb_has_every_metric(tracked, offline):
    found = {}
    for row in wandb_files.history(offline):
        step = int(row.get("trainer/global_step", -1))
        found |= {(step, name): value for name, value in row.items() if isinstance(value, int | float)}
    written = {
        (int(row["step"]), name): float(value)
        for row in rows(tracked)
        for name, value in row.items()
        if value not in ("", None) and name != "step"
    }
    names = {name for _, name in written}
    assert {"train/dim_loss/x", "grad_norm/all", "activations/encoder.layers.0/max", "eval/success"} <= names
    assert {key: found.get(key) for key in written} == pytest.approx(written)


def test_wandb_has_the_configuration_the_code_and_the_machine(offline):
    config = wandb_files.config(offline)
    assert config["framework"]["_target_"].endswith("ACT")
    assert config["trainer"]["max_steps"] == 4
    assert len(config["code"]["commit"]) == 40
    assert {r.run.project for r in offline if r.HasField("run")} == {"stick"}
    assert any(r.HasField("environment") or "wandb-metadata.json" in str(r.files) for r in offline)


def test_wandb_has_the_videos(tracked, offline):
    videos = wandb_files.videos(offline)
    assert set(videos) == {"rollouts/walk/0", "rollouts/run/0"}
    for video in videos.values():
        (file,) = tracked.glob(f"wandb/offline-run-*/files/{video['path']}")
        assert file.read_bytes()[4:8] == b"ftyp"
        assert video["size"] == file.stat().st_size


def test_an_evaluation_uses_the_artifact_that_training_made(tracked, offline, tmp_path, monkeypatch):
    run_id = (tracked / "wandb_id").read_text()
    made = [r.artifact for r in offline if r.HasField("artifact") and r.artifact.type == "model"]
    assert {artifact.name for artifact in made} == {f"checkpoint-{run_id}"}
    assert set(made[-1].aliases) >= {"last", "step-4"}
    cfg = compose([f"ckpt={tracked}", f"output_dir={tmp_path}", "wandb=true"], "eval")
    cfg.merge_with({"episodes": 2, "num_workers": 1, "controls": [], "env": None})
    monkeypatch.setattr(evaluation, "suite_node", lambda *_: None)
    monkeypatch.setattr(evaluation, "build_suite", lambda _: StickSuite())
    monkeypatch.chdir(tmp_path)
    result = evaluation.evaluate(cfg)
    wandb.teardown()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found = wandb_files.records(file)
    (used,) = [r.artifact for r in found if r.HasField("artifact")]
    assert used.use_after_commit
    assert not any(artifact.use_after_commit for artifact in made)
    assert (used.name, used.digest) == (made[-1].name, made[-1].digest)
    assert {r.run.job_type for r in found if r.HasField("run")} == {"evaluation"}
    logged = {name: value for row in wandb_files.history(found) for name, value in row.items()}
    assert logged["eval/success"] == result["success"]
    assert len(wandb_files.videos(found)) == 2


def test_tensorboard_plays_the_videos(tracked):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tracked / "tensorboard")).Reload()
    assert set(events.Tags()["images"]) == {"rollouts/walk/0", "rollouts/run/0"}
    pictures = events.Images("rollouts/walk/0")
    assert [picture.step for picture in pictures] == [1, 3]  # as in metrics.csv
    assert pictures[0].encoded_image_string[:4] == b"GIF8"


def test_mlflow_has_it_all(tracked):
    client = pytest.importorskip("mlflow").MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (experiment,) = client.search_experiments(filter_string="name = 'librobot'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == (tracked / "mlflow_id").read_text()
    losses = [float(row["train/loss"]) for row in rows(tracked) if row["train/loss"]]
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [metric.value for metric in history] == pytest.approx(losses)
    assert found.data.params["framework/horizon"] == "4"
    assert len(found.data.tags["mlflow.source.git.commit"]) == 40
    assert Path(found.data.tags["checkpoint.last"]) == tracked / "checkpoints/last.ckpt"
    steps = client.list_artifacts(found.info.run_id, "rollouts/walk/0")
    assert [Path(step.path).name for step in steps] == ["step=00000001", "step=00000003"]
