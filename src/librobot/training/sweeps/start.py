"""What happens once, before the first job of any sweep: its folder is settled, its axes are looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from librobot.errors import LibrobotError


class BeforeSweep(Callback):
    """Hydra's callback of librobot-train.

    The sweep's own files (Hydra's multirun.yaml, a launcher's logs, Optuna's study) go where its jobs do: to
    `run_dir` where that is given. An axis that adds a key (`+optim.nesterov=true,false`) which its component
    does not take is refused here; Hydra itself refuses the others.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        given = config.get("run_dir")
        if given and not OmegaConf.is_interpolation(config, "run_dir"):
            quoted = str(given).replace("\\", "\\\\").replace("'", "\\'")
            with read_write(config.hydra), open_dict(config.hydra):
                config.hydra.sweep.dir = str(given)
                config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")
        try:
            check_added_axes(list(config.hydra.overrides.task))
        except LibrobotError as error:  # Hydra would only log what a callback raises
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from error


def check_added_axes(overrides: Sequence[str]) -> None:
    """Raise LibrobotError for an axis with `+` whose key no job of the sweep has a use for.

    Asks a process of its own, because it has to import the components (torch with them); sweeps without such
    an axis ask nobody.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    axes = [o for o in parsed if o.is_sweep_override()]
    added = [o.key_or_group for o in axes if o.is_add() or o.is_force_add()]
    if not added:
        return
    fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
    columns = [[f"{o.get_key_element()}={value}" for value in _values(o)] for o in axes]
    jobs = [
        [*fixed, *(value or column[-1] for value, column in zip(row, columns, strict=True))]
        for row in zip_longest(*columns)
    ]
    command = [sys.executable, "-m", "librobot.training.sweeps.start", json.dumps([added, jobs])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 3:
        raise LibrobotError(done.stdout.strip())


def _values(override: Override) -> list[str]:
    if override.is_discrete_sweep() and "glob(" not in str(override.input_line):
        return list(override.sweep_string_iterator())
    value: Any = override.value()
    return [str(value.start), str(value.end)] if override.is_interval_sweep() else ["null"]


def problems(added: Sequence[str], jobs: Sequence[Sequence[str]]) -> list[str]:
    """What is wrong at each of the keys in every job that composes."""
    from librobot.config.check import check
    from librobot.config.compose import compose

    wrong: list[dict[str, str]] = []
    for job in jobs:
        try:
            cfg = compose([o for o in job if not o.startswith("hydra")])
        except LibrobotError:
            continue  # that job says so itself
        found: dict[str, str] = {}
        try:
            check(cfg)
        except LibrobotError as error:
            found = {line.partition(":")[0]: line for line in str(error).splitlines()}
        wrong.append({key: found[key] for key in added if key in found})
    return [line for key, line in (wrong[0] if wrong else {}).items() if all(key in other for other in wrong)]


if __name__ == "__main__":
    if lines := problems(*json.loads(sys.argv[1])):
        print("\n".join(lines))
        sys.exit(3)
