"""How every command starts and fails: `--debug`, one message for each error, exit codes."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from librobot.config.explain import ConfigError, explain
from librobot.errors import LibrobotError

DEBUG = "LIBROBOT_DEBUG"  # read by the processes that a command starts


def start(command: Callable[[], Any], config_name: str = "") -> None:
    """Run `command` and exit: 0, 2 for bad input, 1 for another failure, each with its message."""
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        os.environ[DEBUG] = "1"
    for flag in {"-m", "--multirun"} & set(sys.argv):  # Hydra refuses it between overrides
        sys.argv.remove(flag)
        sys.argv.insert(1, flag)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sys.exit(report(error, config_name))


def task(function: Callable[..., Any]) -> Callable[..., Any]:
    """For a Hydra task: report its errors here, before Hydra adds its own words; a sweep goes on instead."""

    @functools.wraps(function)
    def wrapped(cfg: Any) -> Any:
        try:
            return function(cfg)
        except Exception as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            sys.exit(report(error))

    return wrapped


def report(error: Exception, config_name: str = "") -> int:
    """Print what went wrong and return the exit code; a traceback only for `--debug` and our own mistakes."""
    expected = isinstance(error, (LibrobotError, *ConfigError))
    if DEBUG in os.environ or not expected:
        traceback.print_exception(error)
    words = explain(error, sys.argv[1:], config_name) if isinstance(error, ConfigError) else str(error)
    print(f"error: {words if expected else f'{type(error).__name__}: {words}'}", file=sys.stderr, flush=True)
    return getattr(error, "exit_code", 2) if expected else 1
