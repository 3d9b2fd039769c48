"""Programs that import tensorflow, in processes of their own that see no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from librobot.errors import LibrobotError

QUIET = {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}


def check_tensorflow() -> None:
    """Raises LibrobotError without the extra rlds; imports nothing."""
    if importlib.util.find_spec("tensorflow_datasets") is None:
        raise LibrobotError(
            "writing RLDS needs tensorflow_datasets; install it with: pip install 'librobot[rlds]'"
        )


def run_with_tensorflow(
    module: str, arguments: Sequence[str], log: Path, *, line: Callable[[str], None] | None = None
) -> None:
    """Run `python -m MODULE ARGUMENTS`; `line` gets each line of its output. Its errors go to the file `log`.

    Raises LibrobotError without the extra rlds, and RuntimeError with the last line of a program that failed.
    """
    check_tensorflow()
    command = [sys.executable, "-m", module, *arguments]
    with (
        log.open("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | QUIET
        ) as child,
    ):
        assert child.stdout is not None
        for said in child.stdout:
            if line is not None:
                line(said)
        code = child.wait()
        errors.seek(0)
        lines = [each.strip() for each in errors if each.strip()]
    if code:
        raise RuntimeError(lines[-1] if lines and code > 0 else f"exit code {code}")
