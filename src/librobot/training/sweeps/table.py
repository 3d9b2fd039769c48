"""A sweep's folder as a table: one row for each job, one column for each axis."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from librobot.errors import LibrobotError, nearest
from librobot.training.sweeps.jobs import Job, read_job, read_reports

QUESTION = "sweep.json"  # an Optuna sweep's objective, direction and axes
SAME = ("run_dir", "ckpt", "name")  # no axes, though they may differ between jobs
DIRECTIONS = ("minimize", "maximize")


@dataclass(frozen=True)
class Row:
    """A job: `values` of the axes (None where it has no such override), `value` of the objective."""

    job: Job
    run_dir: Path
    values: Mapping[str, float | str | None]
    value: float | None
    reports: Sequence[tuple[int, float]]
    metrics: Mapping[str, float]

    @property
    def seconds(self) -> float | None:
        return None if self.job.ended is None else self.job.ended - self.job.started


@dataclass(frozen=True)
class Sweep:
    """All jobs of a folder, by number; `axes` are the keys whose values differ between them."""

    folder: Path
    objective: str
    direction: str
    axes: tuple[str, ...]
    rows: tuple[Row, ...]
    searched: Mapping[str, str]  # an Optuna sweep's distribution of each axis

    @property
    def finished(self) -> list[Row]:
        return [row for row in self.rows if row.value is not None and row.job.status == "finished"]

    @property
    def ranked(self) -> list[Row]:
        """Finished jobs, the best first."""
        sign = -1 if self.direction == "maximize" else 1
        return sorted(self.finished, key=lambda row: sign * float(row.value or 0))

    def is_numeric(self, axis: str) -> bool:
        return all(isinstance(row.values[axis], float | None) for row in self.rows)

    def is_log(self, axis: str) -> bool:
        """Whether an axis is better shown in its logarithm: where it was searched so, or, in a grid, where it
        is positive over more than a decade and a half."""
        if axis in self.searched:
            return "log=True" in self.searched[axis]
        numbers = [value for row in self.rows if isinstance(value := row.values[axis], float)]
        return bool(numbers) and min(numbers) > 0 and max(numbers) / min(numbers) > 30


def read_sweep(folder: Path, objective: str | None = None, direction: str | None = None) -> Sweep:
    """The sweep whose jobs have their run directories in `folder`.

    `objective` is by default what the sweep was judged by; `direction` what it said, or else to maximise
    successes and minimise all others. Raises LibrobotError where there are no jobs or no such metric.
    """
    found = [(job, path.parent) for path in folder.glob("*/job.json") if (job := read_job(path.parent))]
    if not found:
        raise LibrobotError(
            f"{folder}: expected the folder of a sweep, with a run directory for each job below it, found "
            f"none with a job.json; a sweep is where its run_dir= is, or below outputs/multirun"
        )
    found.sort(key=lambda item: item[0].number)
    question = json.loads((folder / QUESTION).read_text()) if (folder / QUESTION).is_file() else {}
    noted = question.get("objective") or next((job.objective for job, _ in found if job.objective), None)
    chosen = objective or noted
    metrics = {run_dir: _metrics(run_dir) for _, run_dir in found}
    known = sorted({name for values in metrics.values() for name in values})
    if chosen is None:
        raise LibrobotError(
            f"{folder}: expected --objective METRIC, the sweep names none; {nearest('', known)}"
        )
    if chosen not in known and chosen != noted:
        raise LibrobotError(f"--objective {chosen}: no job logged such a metric; {nearest(chosen, known)}")
    if direction is None and chosen == noted:
        direction = question.get("direction")
    direction = direction or ("maximize" if "success" in chosen else "minimize")
    overrides = {run_dir: dict(split(text) for text in job.overrides) for job, run_dir in found}
    axes = _axes(list(overrides.values()))
    rows = tuple(
        Row(
            job,
            run_dir,
            {axis: number(overrides[run_dir].get(axis)) for axis in axes},
            metrics[run_dir].get(chosen, job.value if chosen == job.objective else None),
            read_reports(run_dir) if chosen == job.objective else (),
            metrics[run_dir],
        )
        for job, run_dir in found
    )
    return Sweep(folder, chosen, direction, axes, rows, question.get("axes", {}))


def split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def number(text: str | None) -> float | str | None:
    """What a plot puts on an axis: a number where it is one."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _axes(jobs: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    keys = dict.fromkeys(key for job in jobs for key in job if key not in SAME)
    return tuple(key for key in keys if len({job.get(key) for job in jobs}) > 1)


def _metrics(run_dir: Path) -> dict[str, float]:
    path = run_dir / "metrics.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def cells(sweep: Sweep, row: Row) -> dict[str, Any]:
    """A row as it is shown and written."""
    job = row.job
    shown = {
        "job": job.number,
        "status": job.status,
        sweep.objective: row.value,
        **row.values,
        "steps": row.metrics.get("step"),
        "seconds": row.seconds,
    }
    if any(other.job.error for other in sweep.rows):
        shown["what went wrong"] = job.error.strip().splitlines()[0] if job.error else None
    return shown


def csv_text(sweep: Sweep) -> str:
    """The whole table, jobs by number."""
    lines = [cells(sweep, row) for row in sweep.rows]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()
