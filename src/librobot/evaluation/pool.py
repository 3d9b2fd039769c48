"""Environments in worker processes, driven in waves: every slot gets a command, all replies come back."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import Any

from librobot.errors import LibrobotError
from librobot.evaluation.worker import Reply, Reset, Step
from librobot.sim.base import Suite


class EnvPool:
    """`num_envs` environments of a suite, spread over `num_workers` processes.

    `num_workers` defaults to the number of cores that this process may use. `history` is how many
    observation steps a reply holds (see `librobot.evaluation.worker.Reply`). Raises LibrobotError where a
    suite cannot be pickled, an environment raises, or a process ends.
    """

    def __init__(
        self, suite: Suite, num_envs: int, *, num_workers: int | None = None, history: int = 1
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, found {num_envs}")
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, found {num_workers}")
        if history < 1:
            raise ValueError(f"history must be at least 1, found {history}")
        self.name = suite.name
        count = min(num_envs, num_workers or len(os.sched_getaffinity(0)))
        self.workers = [_Worker() for _ in range(count)]
        self.owner = {slot: self.workers[slot % count] for slot in range(num_envs)}
        try:
            payload = _pickled(suite)
            for worker in self.workers:
                slots = [slot for slot, owner in self.owner.items() if owner is worker]
                worker.send({"path": sys.path, "suite": payload, "slots": slots, "history": history})
            for worker in self.workers:
                self._receive(worker)
        except BaseException:
            self.close()
            raise

    def run(self, commands: Mapping[int, Reset | Step]) -> dict[int, Reply]:
        """Run one command per slot, in parallel over the processes; returns when all have answered."""
        shares: dict[_Worker, dict[int, Reset | Step]] = {}
        for slot, command in commands.items():
            shares.setdefault(self.owner[slot], {})[slot] = command
        for worker, share in shares.items():
            worker.send(share)
        replies: dict[int, Reply] = {}
        for worker in shares:
            replies |= self._receive(worker)
        return replies

    def _receive(self, worker: _Worker) -> dict[int, Reply]:
        answer = worker.receive()
        if answer[0] == "ok":
            return answer[1]
        _, summary, trace = answer
        message = f"an environment of {self.name!r} failed ({summary}); run again with --debug to see where"
        raise LibrobotError(message) from RuntimeError(f"in the environment's process:\n{trace}")

    def close(self) -> None:
        for worker in self.workers:
            worker.close()

    def __enter__(self) -> EnvPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Worker:
    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        command = [sys.executable, "-P", "-m", "librobot.evaluation.worker", str(theirs.fileno())]
        # One thread each: the processes are the parallelism. The path finds librobot from any folder.
        path = os.pathsep.join(filter(None, sys.path))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()

    def send(self, message: Any) -> None:
        try:
            self.connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            self._ended()

    def receive(self) -> tuple[Any, ...]:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._ended()
            raise AssertionError from None  # _ended raises

    def _ended(self) -> None:
        code = self.process.wait(timeout=10)
        cause = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise LibrobotError(
            f"an environment process ended by itself ({cause}); its own output is above. Where it was killed "
            "for memory, lower num_envs; where the simulator crashed, try another renderer"
        )

    def close(self) -> None:
        connection: Connection = self.connection
        with contextlib.suppress(OSError):
            connection.send(None)
        connection.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _pickled(suite: Suite) -> bytes:
    if type(suite).__module__ == "__main__":
        raise LibrobotError(
            f"suite {suite.name!r} is defined in the main script or notebook, which the environment "
            "processes do not import; move its class into a module"
        )
    try:
        return pickle.dumps(suite)
    except Exception as error:
        raise LibrobotError(
            f"suite {suite.name!r} cannot be sent to the environment processes ({error}); a suite must hold "
            "plain values only and open its simulator in make()"
        ) from error
