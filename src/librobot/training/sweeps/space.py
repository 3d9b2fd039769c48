"""The search space of an Optuna sweep, in Hydra's own words for sweeps.

| override | distribution |
| --- | --- |
| `vlm=tiny,smolvlm`, `optim.betas=[0.9,0.95],[0.9,0.999]`, `choice(...)`, `glob(...)` | one of these |
| `optim.lr=interval(1e-5,1e-2)` | uniform |
| `optim.lr=tag(log,interval(1e-5,1e-2))` | uniform in the logarithm |
| `data.batch_size=int(tag(log,interval(8,256)))` | whole numbers, both ends included |
| `framework.horizon=range(4,21,4)` | 4, 8, ... 20; as in Python the end is not included |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep, Transformer

from librobot.errors import LibrobotError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial

Value = str | int | float | bool


@dataclass(frozen=True)
class Space:
    """`axes` are what is searched, by the override's key (`+` included); `fixed` every other override."""

    axes: Mapping[str, BaseDistribution]
    fixed: tuple[str, ...]

    def overrides(self, trial: Trial) -> list[str]:
        """Those of a trial's job; a trial that has its values keeps them."""
        values = {key: trial._suggest(key, axis) for key, axis in self.axes.items()}
        return [*self.fixed, *(assignment(key, value) for key, value in values.items())]

    def corners(self) -> list[list[str]]:
        """Jobs that between them have every choice of every axis, and the ends of its ranges."""
        ends = {key: _ends(axis) for key, axis in self.axes.items()}
        most = max((len(values) for values in ends.values()), default=0)
        return [
            [*self.fixed, *(assignment(key, values[i % len(values)]) for key, values in ends.items())]
            for i in range(most)
        ]


def assignment(key: str, value: Value) -> str:
    """KEY=VALUE as Hydra reads it back."""
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def parse(overrides: Sequence[str], config_loader: Any) -> Space:
    """The space that these overrides span; a later override of the same key replaces an earlier one."""
    found: dict[str, Override] = {}
    for override in OverridesParser.create(config_loader=config_loader).parse_overrides(list(overrides)):
        found[override.get_key_element()] = override
    axes = {key: _distribution(key, o) for key, o in found.items() if o.is_sweep_override()}
    fixed = tuple(str(o.input_line) for o in found.values() if not o.is_sweep_override())
    if not axes:
        raise LibrobotError(
            "hydra/sweeper=optuna: expected something to search, found no list, range or interval among the "
            "overrides; give e.g. 'optim.lr=tag(log,interval(1e-5,1e-2))' framework.horizon=8,16"
        )
    return Space(axes, fixed)


def _distribution(key: str, override: Override) -> BaseDistribution:
    from optuna import distributions

    value: Any = override.value()
    try:
        if override.is_interval_sweep():
            assert isinstance(value, IntervalSweep)
            kind: Any = distributions.FloatDistribution
            if isinstance(value.start, int) and isinstance(value.end, int):
                kind = distributions.IntDistribution
            return kind(value.start, value.end, log="log" in value.tags)
        if override.is_range_sweep() and not value.shuffle:
            return _range(value)
        choices = [_plain(choice) for choice in override.sweep_iterator(Transformer.identity)]
        if len(set(choices)) < len(choices):
            raise ValueError(f"one value comes twice in {choices}")
        return distributions.CategoricalDistribution(choices)
    except ValueError as error:
        raise LibrobotError(f"{override.input_line}: nothing that Optuna can search: {error}") from error


def _range(sweep: RangeSweep) -> BaseDistribution:
    from optuna import distributions

    values = list(sweep.range())
    if not values:
        raise ValueError("the range is empty")
    low, high = min(values), max(values)
    step = abs(sweep.step)
    if all(isinstance(value, int) for value in values):
        return distributions.IntDistribution(low, high, step=int(step))
    return distributions.FloatDistribution(float(low), float(high), step=float(step))


def _plain(choice: Any) -> Value:
    """A choice as Optuna stores it: numbers and truth values as they are, the rest as Hydra writes it."""
    if isinstance(choice, bool | int | float):
        return choice
    return str(Transformer.str(choice))


def _ends(axis: Any) -> list[Value]:
    return list(axis.choices) if hasattr(axis, "choices") else [axis.low, axis.high]
