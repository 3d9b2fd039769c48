"""The report's plots as inline SVG. Text and axes take the page's own text colour, in light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from librobot.evaluation.episode import EpisodeResult

INK = "#123456"  # a colour that nothing else uses: replaced by CSS's currentColor
MAIN, BLANK, SHUFFLED = "#3b7dd8", "#e0913a", "#9a6bc9"
CONTROL_COLOURS = {"blank_images": BLANK, "shuffled_prompts": SHUFFLED}
SUCCESS, FAILURE = "#2ea067", "#d04c48"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "librobot",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
}


def success_plot(result: dict[str, Any]) -> str:
    """Success by kind with 95% intervals: the evaluation beside its controls, the mean on top."""
    runs = {"policy": result} | {name: run for name, run in result["controls"].items() if "tasks" in run}
    kinds = ["all", *result["tasks"]]
    thickness = 0.78 / len(runs)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(7.6, 0.7 + len(kinds) * (0.22 + 0.16 * len(runs)))
        for place, (name, run) in enumerate(runs.items()):
            groups = [run, *(run["tasks"][kind] for kind in kinds[1:])]
            values = [100 * group["success"] for group in groups]
            errors = [
                [max(0.0, v - 100 * g["interval"][0]) for v, g in zip(values, groups, strict=True)],
                [max(0.0, 100 * g["interval"][1] - v) for v, g in zip(values, groups, strict=True)],
            ]
            rows = [row + (place - (len(runs) - 1) / 2) * thickness for row in range(len(kinds))]
            axes.barh(
                rows,
                values,
                height=0.86 * thickness,
                color=CONTROL_COLOURS.get(name, MAIN),
                xerr=errors,
                error_kw={"ecolor": INK, "elinewidth": 0.8, "capsize": 1.8, "capthick": 0.8, "alpha": 0.75},
                label=name.replace("_", " "),
            )
        axes.set_yticks(range(len(kinds)), kinds)
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("success, % (95% Wilson interval)")
        axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        if len(runs) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=len(runs), frameon=False)
        return _svg(figure, "Success by kind of task")


def length_plot(episodes: Sequence[EpisodeResult]) -> str:
    """Histogram of episode lengths, successes and failures stacked."""
    lengths = {
        label: [episode.length for episode in episodes if episode.success == outcome]
        for label, outcome in (("success", True), ("failure", False))
    }
    longest = max(episode.length for episode in episodes)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(7.6, 2.5)
        axes.hist(
            list(lengths.values()),
            bins=min(40, longest),
            range=(0, longest + 1),
            stacked=True,
            color=[SUCCESS, FAILURE],
            label=[f"{label} ({len(values)})" for label, values in lengths.items()],
        )
        axes.set_xlabel("episode length, control steps")
        axes.set_ylabel("episodes")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2, frameon=False)
        return _svg(figure, "Episode lengths")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")  # no pyplot: no global state
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def _svg(figure: Figure, title: str) -> str:
    """The figure as an <svg> element that scales with its column."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # Ids are unique in one figure only; two figures on one page would share clip paths and glyphs.
    prefix = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{prefix}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
