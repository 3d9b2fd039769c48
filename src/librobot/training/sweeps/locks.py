"""One process at a time in a folder: a sweep in its own, a job in its run directory."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from librobot.errors import LibrobotError

LOCK = ".lock"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuse a second sweep in the same folder for as long as the context lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LibrobotError(
                f"{folder}: a sweep is running there already; wait for it, or give another run_dir"
            ) from error
        yield


@contextmanager
def in_turn(run_dir: Path) -> Iterator[tuple[int, bool]]:
    """Wait until no other process has this job: where only the sweep's command was killed, a cluster goes on
    with its jobs, and the same command starts them again.

    Gives the lock's file descriptor, which whatever goes on with the job has to inherit, and whether there
    was a wait. On a file system without locks nobody waits.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("w") as file:
        waited = False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{run_dir}: this job is still running from before; waiting for its end", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
            waited = True
        except OSError:
            pass
        yield file.fileno(), waited
