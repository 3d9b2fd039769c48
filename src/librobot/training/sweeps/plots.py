"""The plots of a sweep's report, as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from librobot.training.sweeps.table import Row, Sweep

MAIN, BEST, PRUNED, FAILED = "#3b7dd8", "#2ea067", "#e0913a", "#d04c48"
COLOURS = matplotlib.colormaps["viridis"]
STYLE: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def all_plots(sweep: Sweep, importances: Mapping[str, float]) -> dict[str, bytes]:
    """Name -> PNG; plots for which there is nothing to show are left out."""
    with matplotlib.rc_context(STYLE):
        made = {
            "history": history(sweep),
            "curves": curves(sweep),
            "importance": importance(importances),
            "slices": slices(sweep),
            "parallel": parallel(sweep),
        }
        return {name: _png(figure) for name, figure in made.items() if figure is not None}


def history(sweep: Sweep) -> Figure:
    """Each job's objective, and the best so far."""
    figure, axes = _figure()
    rows = sweep.finished
    axes.plot(
        [r.job.number for r in rows], [float(r.value or 0) for r in rows], "o", color=MAIN, label="finished"
    )
    choose = max if sweep.direction == "maximize" else min
    best = [choose(float(r.value or 0) for r in rows[: i + 1]) for i in range(len(rows))]
    axes.step([r.job.number for r in rows], best, where="post", color=BEST, label="best so far")
    pruned = [r for r in sweep.rows if r.job.status == "pruned" and r.reports]
    axes.plot(
        [r.job.number for r in pruned], [r.reports[-1][1] for r in pruned], "x", color=PRUNED, label="pruned"
    )
    for row in sweep.rows:
        if row.job.status == "failed":
            axes.axvline(row.job.number, color=FAILED, alpha=0.4, linewidth=1)
    axes.set_xlabel("job (a line: failed)")
    axes.set_ylabel(sweep.objective)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return figure


def curves(sweep: Sweep) -> Figure | None:
    """The objective while jobs trained."""
    rows = [row for row in sweep.rows if row.reports]
    if not any(len(row.reports) > 1 for row in rows):
        return None
    figure, axes = _figure()
    best = sweep.ranked[0].job.number if sweep.finished else None
    for row in rows:
        steps, values = zip(*row.reports, strict=True)
        pruned, is_best = row.job.status == "pruned", row.job.number == best
        colour = PRUNED if pruned else BEST if is_best else MAIN
        axes.plot(steps, values, ".-", color=colour, alpha=1 if is_best else 0.5, zorder=3 if is_best else 2)
    for colour, label in ((BEST, f"best, job {best}"), (MAIN, "finished"), (PRUNED, "pruned")):
        axes.plot([], [], color=colour, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(sweep.objective)
    axes.legend(frameon=False)
    return figure


def importance(importances: Mapping[str, float]) -> Figure | None:
    if not importances:
        return None
    figure, axes = _figure(height=0.9 + 0.3 * len(importances))
    names = list(importances)[::-1]
    axes.barh(names, [importances[name] for name in names], color=MAIN)
    axes.set_xlabel("share (PED-ANOVA: best quarter beside all)")
    return figure


def slices(sweep: Sweep) -> Figure | None:
    """The objective over each axis alone, coloured by the job's number."""
    if not sweep.axes or not sweep.finished:
        return None
    columns = min(3, len(sweep.axes))
    lines = -(-len(sweep.axes) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.4 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(sweep.axes) :]:
        axes.set_visible(False)
    rows = sweep.finished
    for axis, axes in zip(sweep.axes, grid.flat, strict=False):
        positions, ticks = _positions(sweep, rows, axis)
        axes.scatter(positions, [r.value for r in rows], c=[r.job.number for r in rows], cmap=COLOURS, s=18)
        if ticks is not None:
            axes.set_xticks(range(len(ticks)), ticks, rotation=20 if max(map(len, ticks)) > 6 else 0)
        elif sweep.is_log(axis):
            axes.set_xscale("log")
        axes.set_xlabel(axis)
    for line in grid:
        line[0].set_ylabel(sweep.objective)
    return figure


def parallel(sweep: Sweep) -> Figure | None:
    """A line for each finished job through its axes to its objective; the best are dark."""
    rows = sweep.ranked[::-1]
    if len(sweep.axes) < 2 or len(rows) < 2:
        return None
    figure, axes = _figure()
    columns = [_scaled(sweep, rows, axis) for axis in sweep.axes]
    values = [float(row.value or 0) for row in rows]
    low, high = min(values), max(values)
    columns.append([(value - low) / (high - low or 1) for value in values])
    names = [*sweep.axes, sweep.objective]
    for rank, (_, line) in enumerate(zip(rows, zip(*columns, strict=True), strict=True)):
        axes.plot(range(len(names)), line, color=COLOURS(1 - rank / (len(rows) - 1)), alpha=0.8)
    for place, name in enumerate(names):
        axes.axvline(place, color="grey", linewidth=0.5)
        ends = (f"{low:.3g}", f"{high:.3g}") if place == len(sweep.axes) else _ends(sweep, rows, name)
        for height, text in zip((-0.04, 1.04), ends, strict=True):
            axes.text(place, height, text, ha="center", va="top" if height < 0 else "bottom", fontsize=7)
    axes.set_xticks(range(len(names)), names, rotation=15)
    axes.set_yticks([])
    axes.set_ylim(-0.15, 1.15)
    axes.spines["left"].set_visible(False)
    return figure


def _positions(sweep: Sweep, rows: Sequence[Row], axis: str) -> tuple[list[float], list[str] | None]:
    """Where jobs are on an axis: their numbers, or those of their names (with the names)."""
    if sweep.is_numeric(axis) and all(row.values[axis] is not None for row in rows):
        return [float(row.values[axis]) for row in rows], None  # type: ignore[arg-type]
    names = sorted({_word(row, axis) for row in rows})
    return [float(names.index(_word(row, axis))) for row in rows], names


def _word(row: Row, axis: str) -> str:
    value = row.values[axis]
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else value


def _scaled(sweep: Sweep, rows: Sequence[Row], axis: str) -> list[float]:
    positions, names = _positions(sweep, rows, axis)
    if names is None and sweep.is_log(axis):
        positions = [math.log(value) for value in positions]
    low, high = min(positions), max(positions)
    return [(value - low) / (high - low or 1) for value in positions]


def _ends(sweep: Sweep, rows: Sequence[Row], axis: str) -> tuple[str, str]:
    positions, names = _positions(sweep, rows, axis)
    return (names[0], names[-1]) if names else (f"{min(positions):.3g}", f"{max(positions):.3g}")


def _figure(width: float = 7.6, height: float = 3.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")  # no pyplot: no global state
    return figure, figure.add_subplot()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
