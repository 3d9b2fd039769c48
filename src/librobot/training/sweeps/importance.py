"""Which axes of a sweep mattered, by Optuna's PED-ANOVA, which grids are given to as well."""

from __future__ import annotations

import warnings
from typing import Any

from librobot.training.sweeps.table import Sweep

FEWEST = 4  # finished jobs below which nothing is said


def importances(sweep: Sweep) -> dict[str, float]:
    """Share of each axis in what tells the best quarter of the finished jobs from all (Watanabe et al. 2023,
    PED-ANOVA), the largest first; empty where too few jobs have finished or Optuna is not installed."""
    try:
        import optuna
    except ImportError:
        return {}
    rows = [row for row in sweep.finished if all(row.values[axis] is not None for axis in sweep.axes)]
    if len(rows) < FEWEST or not sweep.axes:
        return {}
    axes: dict[str, Any] = {}
    for axis in sweep.axes:
        seen = [row.values[axis] for row in rows]
        if len(set(seen)) < 2:
            continue
        if sweep.is_numeric(axis):
            low, high = min(seen), max(seen)  # type: ignore[type-var]
            axes[axis] = optuna.distributions.FloatDistribution(low, high, log=sweep.is_log(axis))  # type: ignore[arg-type]
        else:
            axes[axis] = optuna.distributions.CategoricalDistribution(sorted({str(value) for value in seen}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an experimental feature
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(direction="maximize" if sweep.direction == "maximize" else "minimize")
        for row in rows:
            values: dict[str, Any] = {
                axis: row.values[axis] if sweep.is_numeric(axis) else str(row.values[axis]) for axis in axes
            }
            study.add_trial(optuna.trial.create_trial(params=values, distributions=axes, value=row.value))
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
        try:
            return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
        except (RuntimeError, ValueError):
            return {}  # all jobs alike: nothing tells them apart
        finally:
            optuna.logging.set_verbosity(verbosity)
