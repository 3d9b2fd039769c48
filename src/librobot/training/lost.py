"""What happens where a process of a run over several devices is gone: the run ends, and says so.

The first process starts the others of its machine. What it hears of one that is gone depends on the network:
an error, or nothing, for ever. Lightning ends it after some seconds, without a word on what to do.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning import Trainer

from librobot.errors import LibrobotError
from librobot.training.launch import how_to_go_on
from librobot.training.worker import say_once

SECONDS = 0.5
"""Between two looks at the other processes."""


class ProcessLost(LibrobotError):
    """A process of the run was killed, and the others cannot go on without it."""

    exit_code = 1


@contextmanager
def ended_with_the_others(trainer: Trainer, run_dir: Path) -> Iterator[None]:
    """For as long as the context lasts, end this process with a message when one that it started is killed.

    Those that end by themselves have said why.
    """
    if trainer.world_size == 1:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(SECONDS):
            if lost := lost_process(trainer, run_dir):
                say_once(run_dir, str(lost))
                os._exit(lost.exit_code)  # whatever the main thread waits for will not come

    thread = threading.Thread(target=watch, name="lost-processes", daemon=True)
    thread.start()
    try:
        yield
    except RuntimeError as error:
        if lost := lost_process(trainer, run_dir):
            raise lost from error
        raise
    finally:
        over.set()
        thread.join()


def lost_process(trainer: Trainer, run_dir: Path) -> ProcessLost | None:
    """The first process that was killed, as an error; None where there is none."""
    started = getattr(trainer.strategy.launcher, "procs", [])
    for rank, process in enumerate(started, 1):
        code = process.poll()
        if code is not None and code < 0 and code != -signal.SIGTERM:  # with that Lightning ends those left
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return ProcessLost(
                f"process {rank} of {len(started) + 1} was ended by {name}{hint}; {how_to_go_on(run_dir)}"
            )
    return None
