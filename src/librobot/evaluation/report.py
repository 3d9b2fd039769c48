"""The evaluation's products: eval.json, videos, one self-contained HTML page, a table on the terminal."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from librobot.evaluation import plots
from librobot.evaluation.episode import EpisodeResult
from librobot.evaluation.video import write_videos


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name beside the file, then rename: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_report(
    folder: Path, result: dict[str, Any], episodes: Sequence[EpisodeResult], *, fps: float, config: str = ""
) -> Path:
    """Write `videos/*.mp4`, `report.html` and `eval.json` into `folder`; returns the page's path.

    `result` is eval.json's content (see `librobot.evaluation.run`), `config` the resolved YAML, `fps` the
    rate of the videos, in frames (control steps) a second. eval.json comes last: where it exists, all does.
    """
    paths = write_videos(episodes, folder / "videos", fps)
    page = folder / "report.html"
    write_text(page, render_page(result, episodes, paths, config=config))
    result = result | {"report": page.name, "videos": [f"videos/{path.name}" for path in paths.values()]}
    write_text(folder / "eval.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    return page


def render_page(
    result: dict[str, Any], episodes: Sequence[EpisodeResult], paths: dict[int, Path], *, config: str = ""
) -> str:
    """The whole page as one string: styles, plots and videos are inside."""
    import jinja2

    template = files("librobot.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    videos = [
        {
            "kind": episode.kind,
            "seed": episode.seed,
            "prompt": episode.prompt,
            "length": episode.length,
            "success": episode.success,
            "data": base64.b64encode(paths[episode.index].read_bytes()).decode(),
        }
        for episode in episodes
        if episode.index in paths
    ]
    return environment.from_string(template).render(
        title=f"Evaluation of {result['policy']}",
        result=result,
        rows=[("all kinds", result), *result["tasks"].items()],
        interval=interval_text,
        videos=videos,
        plots=[plots.success_plot(result), plots.length_plot(episodes)],
        provenance=_provenance(result),
        config=config,
    )


def _provenance(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What a reader needs to repeat the evaluation, as label and text."""
    rows = [
        ("checkpoint", result["checkpoint"]),
        ("suite", json.dumps(result["suite"])),
        ("renderer", result["renderer"]),
        ("execution", result["execution"]),
        ("seed", result["seed"]),
        ("command", result["command"]),
        ("date", result["date"]),
        ("duration", f"{result['seconds']:.0f} s"),
        ("machine", ", ".join(f"{name} {value}" for name, value in result["machine"].items())),
        ("versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items())),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


def interval_text(group: dict[str, Any]) -> str:
    low, high = (100 * bound for bound in group["interval"])
    return f"{low:.0f} to {high:.0f}%"


def print_table(result: dict[str, Any], page: Path, console: Console | None = None) -> None:
    """Success by kind, beside the controls, and where the report is."""
    console = console or Console()
    controls = {name: run for name, run in result["controls"].items() if "tasks" in run}
    table = Table(title=f"{result['policy']} on {result['suite']['name']}", title_justify="left")
    table.add_column("kind")
    for heading in ("success", "95% interval", "episodes", "mean steps"):
        table.add_column(heading, justify="right")
    for name in controls:
        table.add_column(name.replace("_", " "), justify="right")
    for kind, group in result["tasks"].items():
        cells = [f"{100 * run['tasks'][kind]['success']:.0f}%" for run in controls.values()]
        table.add_row(kind, *_cells(group), *cells)
    table.add_section()
    cells = [f"{100 * run['success']:.0f}%" for run in controls.values()]
    table.add_row("all kinds", *_cells(result), *cells, style="bold")
    console.print(table)
    for name, run in result["controls"].items():
        if "skipped" in run:
            console.print(f"control {name} not run: {run['skipped']}", soft_wrap=True)
    if result["latency"]:
        call = result["latency"]["call_ms"]
        size = result["latency"]["batch_size"]["mean"]
        console.print(
            f"policy call: median {call['p50']:.1f} ms, 95% {call['p95']:.1f} ms (batch of {size:.1f})"
        )
    console.print(f"report: {page}", soft_wrap=True, highlight=False)


def _cells(group: dict[str, Any]) -> list[str]:
    success = f"{100 * group['success']:.0f}%"
    return [success, interval_text(group), str(group["episodes"]), f"{group['mean_length']:.0f}"]
