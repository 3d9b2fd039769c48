"""The loop of an Optuna sweep: ask the study, launch the jobs, tell it what became of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from librobot.config.build import build
from librobot.errors import LibrobotError
from librobot.training.sweeps.jobs import read_job
from librobot.training.sweeps.locks import alone
from librobot.training.sweeps.space import Space
from librobot.training.sweeps.study import open_study, seeded, settle, unsettled
from librobot.training.sweeps.watch import Watch

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import Trial

Launch = Callable[[list[list[str]], int], Any]  # overrides of jobs, the first one's number


class OptunaSweep:
    """`n_trials` jobs in all, `n_jobs` at a time, in numbered run directories below `folder`.

    The same command goes on with a sweep that was interrupted: jobs under way then go on from their last
    checkpoint. Jobs that fail count as trials, and the sweep goes on.
    """

    def __init__(
        self,
        folder: Path,
        space: Space,
        launch: Launch,
        *,
        objective: str,
        direction: str,
        n_trials: int,
        n_jobs: int,
        sampler: Mapping[str, Any],
        pruner: Mapping[str, Any] | None,
        first: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        for name, value in (("n_trials", n_trials), ("n_jobs", n_jobs)):
            if value < 1:
                raise LibrobotError(f"hydra.sweeper.{name}: expected at least 1, found {value}")
        self.folder, self.space, self.launch = folder, space, launch
        self.objective, self.direction, self.first = objective, direction, first
        self.n_trials, self.n_jobs = n_trials, n_jobs
        self.sampler, self.pruner = sampler, pruner

    def run(self) -> Study:
        import optuna

        with alone(self.folder):
            study = open_study(self.folder, self.space, self.objective, self.direction, self.first)
            pruner = build(self.pruner, "hydra.sweeper.pruner") if self.pruner else optuna.pruners.NopPruner()
            study.pruner = pruner
            seeded(self.sampler, 0)  # what is wrong with it is said before the first job
            begun = [t for t in unsettled(study) if settle(study, t, self.run_dir(t)) is None]
            if len(study.trials) and any(t.state.is_finished() for t in study.trials):
                self.say(study, f"going on with {len(begun)} unfinished jobs")
            for start in range(0, len(begun), self.n_jobs):
                self.run_jobs(study, begun[start : start + self.n_jobs])
            while trials := self.ask(study):
                self.run_jobs(study, trials)
            self.conclude(study)
        return study

    def ask(self, study: Study) -> list[Trial]:
        """The next trials, each from a sampler of its own seed."""
        import optuna

        waiting = (optuna.trial.TrialState.WAITING,)
        trials = []
        for _ in range(self.n_jobs):
            asked = len(study.get_trials(deepcopy=False)) - len(
                study.get_trials(deepcopy=False, states=waiting)
            )
            if asked >= self.n_trials:
                break
            study.sampler = seeded(self.sampler, asked)
            trial = study.ask()
            self.space.overrides(trial)
            trials.append(trial)
        return trials

    def run_jobs(self, study: Study, trials: Sequence[Trial]) -> None:
        """Run the trials' jobs to their ends, however they end."""
        jobs = [(trial.number, self.job(trial)) for trial in trials]
        with Watch({self.run_dir(trial): trial for trial in trials}):
            for _, group in groupby(enumerate(jobs), lambda item: item[1][0] - item[0]):
                numbered = [job for _, job in group]  # launchers count on from the first one's number
                try:
                    self.launch([overrides for _, overrides in numbered], numbered[0][0])
                except Exception as error:  # a worker or a machine that died, not only a job
                    print(f"launcher: {type(error).__name__}: {error}", flush=True)
        for trial in trials:
            self.say(
                study, f"job {trial.number} {settle(study, trial, self.run_dir(trial), lost=True)}", trial
            )

    def job(self, trial: Trial) -> list[str]:
        own = self.space.overrides(trial)
        return own if any(o.startswith("ckpt=") for o in own) else [*own, "ckpt=auto"]

    def run_dir(self, trial: Trial) -> Path:
        return self.folder / str(trial.number)

    def say(self, study: Study, text: str, trial: Trial | None = None) -> None:
        ended = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
        values = [t.value for t in ended if t.value is not None and t.state.name == "COMPLETE"]
        best = max(values) if self.direction == "maximize" else min(values, default=None) if values else None
        job = read_job(self.run_dir(trial)) if trial is not None else None
        value = f" at {job.value:.6g}" if job is not None and job.value is not None else ""
        known = f", best {self.objective} {best:.6g}" if best is not None else ""
        print(f"sweep {len(ended)}/{self.n_trials}: {text}{value}{known}", flush=True)

    def conclude(self, study: Study) -> None:
        complete = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
        if not complete:
            raise LibrobotError(
                f"none of the sweep's {len(study.trials)} jobs came to its end; what went wrong is printed "
                f"above and in {self.folder}/*/job.json"
            )
        best = study.best_trial
        print(
            f"best: job {best.number}, {self.objective} {best.value:.6g}\n"
            f"its run: {self.folder / str(best.number)}\n"
            f"table and plots: librobot-sweep-report {self.folder}",
            flush=True,
        )
