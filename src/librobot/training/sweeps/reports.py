"""A job's side of pruning: the objective's intermediate values, in a file that the sweeper reads."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

from librobot.training.sweeps.jobs import REPORTS


class Reports(Logger):
    """Appends each logged value of `metric`, whoever logs it, to `run_dir`/reports.jsonl."""

    def __init__(self, run_dir: Path, metric: str) -> None:
        super().__init__()
        self.path, self.metric = run_dir / REPORTS, metric

    @property
    def name(self) -> str:
        return "reports"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """They are in the run's config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.metric in metrics:
            line = json.dumps({"step": int(step or 0), "value": float(metrics[self.metric])})
            with self.path.open("a") as file:
                file.write(line + "\n")
