"""An Optuna study in a file: opened or begun, its trials settled by what their jobs left behind."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from librobot.config.build import build
from librobot.errors import LibrobotError, require
from librobot.training.sweeps.jobs import read_job
from librobot.training.sweeps.space import Space
from librobot.training.sweeps.table import QUESTION

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import Trial

FILE = "study.db"
NAME = "sweep"


@dataclass(frozen=True)
class Question:
    """What a study is about; it can only go on with the same."""

    objective: str
    direction: str
    fixed: list[str]
    axes: dict[str, str]


def open_study(folder: Path, space: Space, objective: str, direction: str, first: Sequence[Mapping]) -> Study:
    """The study in `folder`/study.db, where it is about the same; else a new one, which tries `first` first.

    The file is SQLite, which a process killed in the middle of writing does not harm.
    """
    optuna = require("optuna", "sweep")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if direction not in ("minimize", "maximize"):
        raise LibrobotError(
            f"hydra.sweeper.direction: expected minimize or maximize, found {direction!r}; "
            f"losses are minimised, eval/success is maximised"
        )
    fixed = sorted(o for o in space.fixed if not o.startswith(("run_dir=", "ckpt=")))
    question = Question(objective, direction, fixed, {key: str(axis) for key, axis in space.axes.items()})
    folder.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.RDBStorage(f"sqlite:///{(folder / FILE).absolute()}")
    study = optuna.create_study(storage=storage, study_name=NAME, direction=direction, load_if_exists=True)
    asked = study.user_attrs.get("question")
    if asked is None:
        for values in first:
            study.enqueue_trial(_point(values, space))
        study.set_user_attr("question", asdict(question))
    if asked in (None, asdict(question)):
        (folder / QUESTION).write_text(json.dumps(asdict(question), indent=2))
    else:
        raise LibrobotError(
            f"{folder / FILE} holds a sweep about something else: {_difference(asked, asdict(question))}; "
            f"go on with it by the same command, or give another run_dir"
        )
    return study


def _point(values: Mapping[str, Any], space: Space) -> dict[str, Any]:
    wrong = [key for key in values if key not in space.axes]
    if wrong:
        raise LibrobotError(
            f"hydra.sweeper.first: {wrong[0]} is not searched; the axes are {', '.join(space.axes)}"
        )
    for key, value in values.items():
        axis: Any = space.axes[key]
        known = value in axis.choices if hasattr(axis, "choices") else axis.low <= value <= axis.high
        if not known:
            raise LibrobotError(f"hydra.sweeper.first: {key}={value} is outside of what is searched: {axis}")
    return dict(values)


def _difference(asked: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    key = next(key for key in now if asked.get(key) != now[key])
    then, found = asked.get(key), now[key]
    if isinstance(found, list) and isinstance(then, list):
        gone, new = [x for x in then if x not in found], [x for x in found if x not in then]
        return f"it was begun with {gone}, not {new}"
    return f"its {key} is {then}, not {found}"


def seeded(node: Mapping[str, Any], trials: int) -> Any:
    """The sampler that `node` describes, with a seed of its own for every trial: a sweep that was interrupted
    then asks what it would have asked without."""
    own = dict(node)
    if own.get("seed") is not None:
        own["seed"] += trials
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of experimental options, which the YAML names on purpose
        return build(own, "hydra.sweeper.sampler")


def unsettled(study: Study) -> list[Trial]:
    """Trials that were under way when the sweep was interrupted."""
    import optuna

    waiting = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
    return [optuna.trial.Trial(study, trial._trial_id) for trial in waiting]


def settle(study: Study, trial: Trial, run_dir: Path, lost: bool = False) -> str | None:
    """Tell the study what became of a trial, by its run directory; None where that is not known yet.

    `lost` says that nothing runs there any more: what has no end then has failed.
    """
    import optuna

    states = optuna.trial.TrialState
    job = read_job(run_dir)
    status = job.status if job is not None else "running"
    if status == "finished" and job is not None and job.value is not None:
        study.tell(trial, job.value)
    elif status == "pruned":
        study.tell(trial, state=states.PRUNED)
    elif status == "failed" or lost:
        study.tell(trial, state=states.FAIL)
        return "failed"
    else:
        return None
    return status
