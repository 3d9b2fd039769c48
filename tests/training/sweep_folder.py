"""Folders as the jobs of a sweep leave them, without the jobs."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from librobot.training.sweeps.jobs import REPORTS, Job


def job(
    folder: Path,
    number: int,
    overrides: Sequence[str],
    *,
    status: str = "finished",
    value: float | None = None,
    reports: Sequence[tuple[int, float]] = (),
    metrics: Mapping[str, float] | None = None,
    error: str | None = None,
) -> Path:
    run_dir = folder / str(number)
    noted = Job(number, tuple(overrides), "val/loss", started=100.0)
    noted.write(run_dir)
    noted.end(run_dir, status, value=value, error=error)
    (run_dir / REPORTS).write_text("".join(json.dumps({"step": s, "value": v}) + "\n" for s, v in reports))
    if metrics is not None:
        (run_dir / "metrics.json").write_text(json.dumps(metrics))
    return run_dir


def sweep(folder: Path) -> Path:
    """Ten jobs that look for the learning rate 1e-3: eight finished, one pruned, one failed."""
    for number in range(8):
        rate = 10 ** (-4 + number / 4)
        loss = abs(math.log10(rate) + 3)
        overrides = [
            "framework=act",
            f"optim.lr={rate}",
            f"framework.horizon={8 + number % 2 * 8}",
            "ckpt=auto",
        ]
        metrics = {"val/loss": loss, "train/loss": 2 - loss, "step": 20.0}
        job(folder, number, overrides, value=loss, metrics=metrics, reports=[(10, loss + 1), (20, loss)])
    late = ["framework=act", "optim.lr=1.0", "framework.horizon=8", "ckpt=auto"]
    job(folder, 8, late, status="pruned", reports=[(10, 5.0)])
    job(folder, 9, [*late[:1], "optim.lr=2.0", *late[2:]], status="failed", error="out of memory\nat step 3")
    return folder
