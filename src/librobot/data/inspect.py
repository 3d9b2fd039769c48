"""What `librobot-data info` and `librobot-data stats` print."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from librobot.data.sources.lerobot import LeRobotSource


def print_info(root: str | Path, console: Console | None = None) -> None:
    """The dataset's size, robot, features and instructions. Raises LibrobotError for what is not a
    dataset."""
    console = console or Console()
    source = LeRobotSource(root)
    metadata, spec, lengths = source.metadata, source.spec, source.episode_lengths
    size = sum(path.stat().st_size for path in source.root.rglob("*") if path.is_file())
    seconds = lengths.sum() / metadata.fps
    console.print(f"[bold]{source.root}[/bold]")
    summary = Table(show_header=False, box=None)
    for name, value in (
        ("format", source.provenance["format"]),
        ("robot", f"{spec.name}, {spec.control_hz:g} Hz"),
        (
            "episodes",
            f"{len(lengths)} ({lengths.min()} to {lengths.max()} frames, mean {lengths.mean():.1f})",
        ),
        ("frames", f"{lengths.sum()} ({seconds / 60:.1f} min)"),
        ("size", f"{size / 2**20:.1f} MiB"),
        ("renderer", str(source.provenance["renderer"] or "-")),
    ):
        summary.add_row(name, value)
    console.print(summary)

    features = Table("feature", "stored as", "shape", "names", title="Features", title_justify="left")
    for key, feature in metadata.features.items():
        names = feature.get("names")
        shape = "x".join(str(side) for side in feature["shape"])
        features.add_row(key, feature["dtype"], shape, ", ".join(map(str, names)) if names else "-")
    console.print(features)

    rows_of_episode = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    prompts = source.prompts(rows_of_episode)
    tasks = Table("instruction", "episodes", "frames", title="Instructions", title_justify="left")
    for prompt in sorted(set(prompts)):
        chosen = np.array([p == prompt for p in prompts])
        tasks.add_row(prompt, str(chosen.sum()), str(lengths[chosen].sum()))
    console.print(tasks)


def print_stats(root: str | Path, console: Console | None = None) -> None:
    """Statistics of state and action, per dimension, in physical units."""
    console = console or Console()
    source = LeRobotSource(root)
    columns = ("mean", "std", "min", "q01", "q50", "q99", "max")
    for key, dims in (("state", source.spec.state), ("action", source.spec.action)):
        if not dims:
            continue
        statistics = source.statistics()[key]
        table = Table(key, "unit", *columns, title=f"{key} of {source.root}", title_justify="left")
        for i, dim in enumerate(dims):
            table.add_row(dim.name, dim.unit or "-", *(f"{statistics[name][i]:.4g}" for name in columns))
        console.print(table)
