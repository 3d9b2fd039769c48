"""The sweeper's side of pruning: while jobs run, their reports go to the study, which may have them ended."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from librobot.training.sweeps.jobs import PRUNE, read_reports

if TYPE_CHECKING:
    from optuna.trial import Trial

SECONDS = 1.0  # between two looks at the files


class Watch:
    """For as long as the context lasts, hand the reports of `trials` (by their run directories) to the study.

    Where the study's pruner has seen enough of a job, its run directory gets the file `prune`.
    """

    def __init__(self, trials: Mapping[Path, Trial], seconds: float = SECONDS) -> None:
        self.trials, self.seconds = dict(trials), seconds
        self.seen: dict[Path, set[int]] = {
            run_dir: set(trial.study._storage.get_trial(trial._trial_id).intermediate_values)
            for run_dir, trial in self.trials.items()
        }
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.error: Exception | None = None

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        self.thread.join()
        if kind is None:
            self.look(over=True)  # what came since the last time
        if kind is None and self.error is not None:
            raise self.error

    def _watch(self) -> None:
        try:
            while not self.over.wait(self.seconds):
                self.look()
        except Exception as error:  # raised again where the sweep waits for its jobs
            self.error = error

    def look(self, over: bool = False) -> None:
        """Tell the study what is new, report by report, so that none is judged by what came after it."""
        for run_dir, trial in self.trials.items():
            for step, value in read_reports(run_dir):
                if step in self.seen[run_dir]:
                    continue
                self.seen[run_dir].add(step)
                trial.report(value, step)
                if not over and trial.should_prune() and not (run_dir / PRUNE).exists():
                    (run_dir / PRUNE).write_text(f"after step {step}, at {value:.6g}\n")
