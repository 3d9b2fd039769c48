"""Where metrics go: a CSV file that survives resuming, W&B without an account, TensorBoard, MLflow."""

from __future__ import annotations

import csv
import io
import os
import secrets
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_only
from lightning.pytorch.loggers import Logger

from librobot.errors import require
from librobot.evaluation.wandb_run import NOTE, Keep, check_keep, is_offline
from librobot.training.trackers import MLflowRun, TensorBoardRun, WandbRun


class CSVLogger(Logger):
    """Writes `save_dir`/metrics.csv (one row per logged step) and hparams.yaml.

    Every value is in the file as soon as it is logged. A resumed run goes on in the same file: rows from
    after the checkpoint's step are dropped, so that the file reads as if the run had never stopped. A step
    that is logged again has one row still; a process that is killed meanwhile leaves that row, old or new.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self.columns = ["step"]
        self.row: dict[str, Any] = {}  # the newest one, which may still get values
        self.place = 0  # in the file, in bytes, of that row

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        plain = vars(params) if isinstance(params, Namespace) else params
        self.path.parent.mkdir(parents=True, exist_ok=True)
        (self.path.parent / "hparams.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        number = int(step or 0)
        if not self.row:
            self._begin(number)
        elif number != self.row["step"]:
            self.row, self.place = {"step": number}, self.path.stat().st_size
        elif metrics.items() <= self.row.items():
            return
        self.row |= metrics
        new = sorted(self.row.keys() - set(self.columns))
        if new:
            earlier = [row for row in self._read() if int(row["step"]) != number]
            self._rewrite(earlier, [*self.columns, *new])
            return
        line = io.StringIO(newline="")
        csv.DictWriter(line, self.columns).writerow(self.row)
        with self.path.open("rb+") as file:
            file.seek(self.place)
            file.write(line.getvalue().encode())
            file.truncate()

    def _begin(self, number: int) -> None:
        """Take over the rows of an earlier part of this run, and what it logged for step `number` already."""
        earlier = self._read() if number > 0 else []
        same = [row for row in earlier if int(row["step"]) == number]
        given = {key: value for row in same for key, value in row.items() if value != ""}
        self.row = {**given, "step": number}
        columns = list(earlier[0]) if earlier else ["step"]
        self._rewrite([row for row in earlier if int(row["step"]) < number], columns)

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        whole = self.path.read_text().rpartition("\n")[0]  # without a row that was being written
        return list(csv.DictReader(whole.splitlines()))

    def _rewrite(self, earlier: list[dict[str, Any]], columns: list[str]) -> None:
        """Write the file anew: rows, and the newest one behind them."""
        self.columns = columns
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.tmp")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(earlier)
            file.flush()
            self.place = partial.stat().st_size
            writer.writerow(self.row)
        partial.replace(self.path)


def wandb_logger(
    save_dir: str,
    project: str = "librobot",
    name: str | None = None,
    entity: str | None = None,
    group: str | None = None,
    tags: list[str] | None = None,
    offline: bool | None = None,
    checkpoints: Keep = "reference",
) -> WandbRun:
    """A W&B run. `offline=null` means: online where an API key is configured, offline otherwise.

    A resumed run goes on in the same W&B run, whose id is kept in `save_dir`/wandb_id. `checkpoints` says
    what becomes of the last and the best one at the end: none; reference (an artifact that says where the
    file is, with its checksum); upload.
    """
    wandb = require("wandb", "wandb")
    check_keep(checkpoints, "logger.wandb.checkpoints")
    folder = Path(save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if offline is None:
        offline = is_offline(wandb)
        if offline:
            rank_zero_info(
                f"W&B: no API key is configured, so the run is kept in {folder / 'wandb'} "
                f"(send it later with `wandb sync`); log in with `wandb login`"
            )
    note = folder / NOTE
    if not note.exists():
        note.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))  # an agent's, in a W&B sweep
    return WandbRun(
        checkpoints=checkpoints,
        save_dir=save_dir,
        project=project,
        name=name,
        entity=entity,
        group=group,
        tags=tags,
        offline=offline,
        mode="offline" if offline else None,
        id=note.read_text().strip(),
        resume="allow",
        job_type="training",
    )


def tensorboard_logger(save_dir: str) -> TensorBoardRun:
    """TensorBoard's event files in `save_dir` itself; a resumed run adds a file there."""
    require("tensorboard", "all")
    # TensorBoard imports all of tensorflow where it finds it (the extra rlds brings it), but for this.
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
    return TensorBoardRun(save_dir=save_dir, name="", version="", default_hp_metric=False)


def mlflow_logger(
    save_dir: str,
    tracking_uri: str,
    artifacts: str | None = None,
    experiment: str = "librobot",
    name: str | None = None,
    tags: dict[str, str] | None = None,
    checkpoints: Keep = "reference",
) -> MLflowRun:
    """An MLflow run in the store at `tracking_uri`: a server, or a local sqlite:/// file.

    `artifacts` is the folder for files of a new experiment, null the store's own. A resumed run goes on in
    the same MLflow run, whose id is kept in `save_dir`/mlflow_id. `checkpoints` as in `wandb_logger`; a
    reference is a tag with the path.
    """
    require("mlflow", "mlflow")
    check_keep(checkpoints, "logger.mlflow.checkpoints")
    Path(save_dir).mkdir(parents=True, exist_ok=True)
    if tracking_uri.startswith("sqlite:///"):
        Path(tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MLflowRun(
        note=Path(save_dir) / "mlflow_id",
        checkpoints=checkpoints,
        experiment_name=experiment,
        run_name=name,
        tracking_uri=tracking_uri,
        tags=tags,
        artifact_location=None if artifacts is None else Path(artifacts).absolute().as_uri(),
    )
