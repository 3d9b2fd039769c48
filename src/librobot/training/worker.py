"""The training process: `python -m librobot.training.worker RUN_DIR/config.yaml`.

Lightning starts one such process for each further device; a message that several of them have to give is
printed once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import sys
import traceback
from pathlib import Path

from librobot.config.compose import read
from librobot.errors import LibrobotError
from librobot.training.quiet import quieten

DEBUG = "LIBROBOT_DEBUG"  # set by --debug; inherited by every process of a run


def main(arguments: list[str] | None = None) -> int:
    """Run the job; return 0, 2 for bad input, 1 for another failure, 128 + signal when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        print("usage: python -m librobot.training.worker RUN_DIR/config.yaml", file=sys.stderr)
        return 2
    config, launcher = Path(arguments[0]), os.getppid()
    if is_first():
        end_with_parent()
        for note in config.parent.glob(".failed-*"):
            note.unlink()
    quieten()
    try:
        cfg = read(config)
        from librobot.training.run import run

        run(cfg)
    except KeyboardInterrupt:
        return 130
    except LibrobotError as error:
        say_once(config.parent, str(error), traceback.format_exc() if DEBUG in os.environ else "")
        return getattr(error, "exit_code", 2)
    except Exception as error:
        if not is_first() and os.getppid() != launcher:
            return 1  # the first process is gone, of which its launcher tells
        say_once(config.parent, f"{type(error).__name__}: {error}", traceback.format_exc())
        return 1
    return 0


def end_with_parent() -> None:
    """Have the kernel send SIGTERM when the launcher dies, even by SIGKILL: nobody waits for this run."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


def is_first() -> bool:
    """Whether this is the process that the launcher started, not one that Lightning added."""
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("SLURM_PROCID", "0") == "0"


def say_once(folder: Path, message: str, trace: str = "") -> None:
    """Print `message` unless another process of the run already has."""
    note = folder / f".failed-{hashlib.sha256(message.encode()).hexdigest()[:16]}"
    try:
        with note.open("x") as file:
            file.write(message)
    except FileExistsError:
        return
    except OSError:
        pass  # a folder that cannot be written to: better twice than not at all
    if trace:
        print(trace, file=sys.stderr, end="")
    print(f"error: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
