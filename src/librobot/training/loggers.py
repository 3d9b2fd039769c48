"""Where metrics go: a CSV file that survives resuming, and W&B without an account."""

from __future__ import annotations

import csv
import inspect
import os
import secrets
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_only
from lightning.pytorch.loggers import Logger

from librobot.errors import require

if TYPE_CHECKING:
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger


class CSVLogger(Logger):
    """Writes `save_dir`/metrics.csv (one row per logged step) and hparams.yaml.

    Every value is in the file as soon as it is logged. A resumed run goes on in the same file: rows from
    after the checkpoint's step are dropped, so that the file reads as if the run had never stopped.
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
        self.row |= metrics
        new = sorted(self.row.keys() - set(self.columns))
        if new:
            earlier = [row for row in self._read() if int(row["step"]) != number]
            self._rewrite(earlier, [*self.columns, *new])
        os.truncate(self.path, self.place)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(self.row)

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
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, rows: list[dict[str, Any]], columns: list[str]) -> None:
        """Write the file anew, up to where the newest row goes."""
        self.columns = columns
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.tmp")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self.path)
        self.place = self.path.stat().st_size


def wandb_logger(
    save_dir: str,
    project: str = "librobot",
    name: str | None = None,
    entity: str | None = None,
    group: str | None = None,
    tags: list[str] | None = None,
    offline: bool | None = None,
) -> WandbLogger:
    """Lightning's W&B logger. `offline=null` means: online where an API key is configured, offline otherwise.

    A resumed run goes on in the same W&B run, whose id is kept in `save_dir`/wandb_id.
    """
    wandb = require("wandb", "wandb")
    from lightning.pytorch.loggers import WandbLogger

    folder = Path(save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if offline is None:
        offline = os.environ.get("WANDB_MODE") == "offline" or not has_account(wandb)
        if offline:
            rank_zero_info(
                f"W&B: no API key is configured, so the run is kept in {folder / 'wandb'} "
                f"(send it later with `wandb sync`); log in with `wandb login`"
            )
    note = folder / "wandb_id"
    if not note.exists():
        note.write_text(secrets.token_hex(4))
    return WandbLogger(
        save_dir=save_dir,
        project=project,
        name=name,
        entity=entity,
        group=group,
        tags=tags,
        offline=offline,
        id=note.read_text().strip(),
        resume="allow",
    )


def has_account(wandb: ModuleType) -> bool:
    """Whether W&B knows who the user is; asks nobody, neither the user nor the network."""
    if "prompt" in inspect.signature(wandb.login).parameters:  # since the autumn of 2026
        return bool(wandb.login(prompt=False, verify=False))
    return wandb.api.api_key is not None


def tensorboard_logger(save_dir: str) -> TensorBoardLogger:
    """Lightning's TensorBoard logger, writing into `save_dir` itself; a resumed run adds a file there."""
    require("tensorboard", "all")
    # TensorBoard imports all of tensorflow where it finds it (the extra rlds brings it), but for this.
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(save_dir=save_dir, name="", version="", default_hp_metric=False)
