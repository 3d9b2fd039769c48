"""What a job of a sweep leaves in its run directory, for the report and the sweeper, which may run elsewhere.

- `job.json`: its number, overrides, objective and what became of it (`Job`);
- `reports.jsonl`: the objective's intermediate values, one {"step", "value"} a line, as they are logged;
- `prune`: put there by the sweeper; the job's launcher then ends the training process as a signal would.

Files, because jobs run in other processes and on other machines that share nothing but a file system.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

JOB = "job.json"
REPORTS = "reports.jsonl"
PRUNE = "prune"
STATUSES = ("running", "finished", "failed", "pruned", "interrupted")


@dataclass(frozen=True)
class Job:
    """One job: `status` is one of STATUSES, `value` the objective of a finished one, times in seconds."""

    number: int
    overrides: tuple[str, ...] = ()
    objective: str | None = None
    status: str = "running"
    value: float | None = None
    exit_code: int | None = None
    error: str | None = None
    started: float = field(default_factory=time.time)
    ended: float | None = None

    def write(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        partial = run_dir / f".{JOB}.tmp"
        partial.write_text(json.dumps(asdict(self), indent=2))
        partial.replace(run_dir / JOB)

    def end(self, run_dir: Path, status: str, **values: Any) -> None:
        """Note what became of it; one that had ended before keeps the time of that."""
        replace(self, status=status, ended=self.ended or time.time(), **values).write(run_dir)


def begin(
    run_dir: Path, number: int, overrides: Sequence[str], objective: str | None, *, done: bool = False
) -> Job:
    """Note that a job starts; an earlier wish to prune it, which did not come true, is forgotten.

    Of a run that is `done` already, nothing of which runs again, the times stay what they were.
    """
    (run_dir / PRUNE).unlink(missing_ok=True)
    job = Job(number, tuple(overrides), objective)
    if done and (earlier := read_job(run_dir)):
        job = replace(job, started=earlier.started, ended=earlier.ended)
    job.write(run_dir)
    return job


def read_job(run_dir: Path) -> Job | None:
    """The job whose run directory this is; None where none has begun there."""
    path = run_dir / JOB
    if not path.is_file():
        return None
    values = json.loads(path.read_text())
    return Job(**{**values, "overrides": tuple(values["overrides"])})


def read_reports(run_dir: Path) -> list[tuple[int, float]]:
    """Step and value of each finite report so far, by step; of a step reported twice the last counts."""
    path = run_dir / REPORTS
    found: dict[int, float] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            report = json.loads(line)
        except json.JSONDecodeError:
            continue  # the end of a line that is being written
        if math.isfinite(report["value"]):
            found[int(report["step"])] = float(report["value"])
    return sorted(found.items())
