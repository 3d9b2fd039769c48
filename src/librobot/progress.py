"""A progress bar with an estimate of what remains; plain lines where the output is not a terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 10.0


class ProgressBar:
    """Counts `total` units under a title. Use as a context manager; call `advance` as units finish."""

    def __init__(self, title: str, total: int, *, show: bool = True, console: Console | None = None) -> None:
        self.title, self.total, self.show = title, total, show
        self.console = console or Console(stderr=True)
        self.done, self.note = 0, ""
        self.started = self.printed = time.monotonic()
        self.bar: Progress | None = None

    def __enter__(self) -> ProgressBar:
        if self.show and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                console=self.console,
            )
            self.bar.add_task(self.title, total=self.total, note="")
            self.bar.start()
        return self

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done, self.note = self.done + count, note
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], advance=count, note=note)
        elif self.show and (self.done == self.total or time.monotonic() - self.printed >= LINE_SECONDS):
            self.printed = time.monotonic()
            self.console.print(self._line(), highlight=False, soft_wrap=True)

    def _line(self) -> str:
        elapsed = time.monotonic() - self.started
        left = elapsed / self.done * (self.total - self.done)
        return f"{self.title} {self.done}/{self.total} {self.note} {elapsed:.0f} s, about {left:.0f} s left"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
