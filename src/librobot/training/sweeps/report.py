"""librobot-sweep-report: a sweep's folder as a page with its table and plots."""

from __future__ import annotations

import base64
import os
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from librobot.errors import LibrobotError
from librobot.training import pages
from librobot.training.sweeps.importance import importances
from librobot.training.sweeps.plots import all_plots
from librobot.training.sweeps.table import DIRECTIONS, Row, Sweep, cells, csv_text, read_sweep

TITLES = {
    "history": "The objective, job by job",
    "curves": "The objective while jobs trained",
    "importance": "Which axes mattered",
    "slices": "The objective over each axis",
    "parallel": "Jobs across all axes (dark: the best)",
}


def report(
    folder: Path, objective: str | None = None, direction: str | None = None, output: Path | None = None
) -> Path:
    """Write index.html (self-contained), table.csv and the plots into `output` (default: `folder`/report);
    returns the page."""
    if direction not in (None, *DIRECTIONS):
        raise LibrobotError(f"direction: expected {' or '.join(DIRECTIONS)}, found {direction!r}")
    sweep = read_sweep(folder, objective, direction)
    target = output or folder / "report"
    target.mkdir(parents=True, exist_ok=True)
    mattered = importances(sweep)
    plots = all_plots(sweep, mattered)
    for name, data in plots.items():
        _write(target / f"{name}.png", data)
    _write(target / "table.csv", csv_text(sweep).encode())
    page = target / "index.html"
    _write(page, render(sweep, plots).encode())
    show(sweep, page)
    return page


def render(sweep: Sweep, plots: dict[str, bytes]) -> str:
    ordered = ordered_rows(sweep)
    best = sweep.ranked[0] if sweep.finished else None
    return pages.render(
        "sweeps/report.html",
        title=f"Sweep {sweep.folder.resolve().name}",
        sweep=sweep,
        counts=counts(sweep),
        best=best,
        command=command(best) if best else None,
        header=list(cells(sweep, ordered[0])),
        rows=[[_text(cell) for cell in cells(sweep, row).values()] for row in ordered],
        statuses=[row.job.status for row in ordered],
        plots=[(TITLES[name], base64.b64encode(data).decode()) for name, data in plots.items()],
    )


def ordered_rows(sweep: Sweep) -> list[Row]:
    """The finished jobs, the best first, then the others."""
    ranked = sweep.ranked
    return [*ranked, *(row for row in sweep.rows if row not in ranked)]


def counts(sweep: Sweep) -> str:
    """'16 jobs: 11 finished, 4 pruned, 1 failed'."""
    statuses = [row.job.status for row in sweep.rows]
    kinds = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    return f"{len(statuses)} jobs: {kinds}"


def command(row: Row) -> str:
    """What trains the same again."""
    kept = [o for o in row.job.overrides if not o.startswith(("ckpt=", "run_dir=", "objective="))]
    return " ".join(["librobot-train", *(shlex.quote(override) for override in kept)])


def show(sweep: Sweep, page: Path, console: Console | None = None) -> None:
    """The table on the terminal."""
    console = console or Console()
    rows = ordered_rows(sweep)
    table = Table(title=f"{sweep.folder}: {counts(sweep)}", title_justify="left")
    for name in cells(sweep, rows[0]):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(_text(cell) for cell in cells(sweep, row).values()))
    console.print(table)
    if sweep.finished:
        console.print(f"the best again: {command(sweep.ranked[0])}", soft_wrap=True, highlight=False)
    console.print(f"report: {page}", soft_wrap=True, highlight=False)


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_bytes(data)
    partial.replace(path)
