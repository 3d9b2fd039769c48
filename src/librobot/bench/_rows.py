"""What every measurement writes: rows of "ours" beside "peer", and on which machine."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from librobot.evaluation import machine
from librobot.evaluation.report import write_text


@dataclass(frozen=True)
class Row:
    """One comparison. `goal` is the largest ratio ours / peer that is wanted; None where none is set."""

    name: str
    ours: float
    peer: float
    peer_name: str
    unit: str
    goal: float | None = None

    @property
    def ratio(self) -> float:
        return self.ours / self.peer

    def to_dict(self) -> dict[str, Any]:
        plain = asdict(self)
        goal = plain.pop("goal")
        unit = plain.pop("unit")
        return plain | {"ratio": self.ratio, "unit": unit, "goal": goal}


def write_rows(path: Path, rows: list[Row]) -> None:
    """The rows, the machine, the versions, the command and the date, as JSON."""
    content = {
        "rows": [row.to_dict() for row in rows],
        "machine": machine.machine(),
        "versions": machine.versions(),
        "command": machine.command(),
        "date": machine.now(),
    }
    write_text(path, json.dumps(content, indent=2) + "\n")


def print_rows(title: str, rows: list[Row], path: Path, console: Console | None = None) -> None:
    """The rows as a table, and where the JSON is."""
    console = console or Console()
    table = Table(title=title, title_justify="left")
    table.add_column("measurement")
    for heading in ("librobot", "peer", "ratio", "goal"):
        table.add_column(heading, justify="right")
    for row in rows:
        goal = "" if row.goal is None else f"at most {row.goal:g}: {'yes' if row.ratio <= row.goal else 'no'}"
        ours, peer = (f"{value:.4g} {row.unit}" for value in (row.ours, row.peer))
        table.add_row(f"{row.name}; peer: {row.peer_name}", ours, peer, f"{row.ratio:.3f}", goal)
    console.print(table)
    console.print(f"written to {path}", soft_wrap=True, highlight=False)
