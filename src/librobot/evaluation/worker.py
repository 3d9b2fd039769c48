"""The process that steps environments: `python -m librobot.evaluation.worker FILE_DESCRIPTOR`.

A plain subprocess and not a `multiprocessing` child: it shares no thread or lock with the parent (which has
torch loaded), it does not import the parent's main module again, and it ends when the parent's end of the
pipe closes. It imports the suite and nothing of torch.

Messages are dictionaries of slot number to command, answered by ("ok", {slot: reply}) or
("error", summary, traceback). None ends the process.
"""

from __future__ import annotations

import pickle
import signal
import sys
import traceback
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Float, UInt8

from librobot.sim.base import EnvObservation, Expert, Suite


@dataclass(frozen=True)
class Reset:
    """Start an episode; `record` keeps the pictures of `env.render()`."""

    kind: str
    seed: int
    record: bool = False


@dataclass(frozen=True)
class Step:
    """Execute actions one after the other until the episode ends.

    With `actions` None the suite's expert acts, for `expert_steps` steps.
    """

    actions: Float[np.ndarray, "n a"] | None
    expert_steps: int = 1


@dataclass
class Reply:
    """What a slot's episode looks like after a command.

    With `history` 1 the observation's images are (h, w, 3) and its state is (s,); with more, the last
    `history` steps are stacked in front, oldest first, the first step repeated where there are too few.
    `frames` are the pictures since the last reply, empty where the episode is not recorded.
    """

    observation: EnvObservation
    success: bool
    done: bool
    length: int
    frames: list[UInt8[np.ndarray, "h w 3"]] = field(default_factory=list)


class Slot:
    """One environment and the episode that it is in."""

    def __init__(self, suite: Suite, history: int) -> None:
        self.suite = suite
        self.env: gymnasium.Env = suite.make()
        self.observations: deque[EnvObservation] = deque(maxlen=history)
        self.expert: Expert | None = None
        self.command = Reset("(none)", -1)
        self.length = 0
        self.success = self.done = False

    def run(self, command: Reset | Step) -> Reply:
        frames = self._reset(command) if isinstance(command, Reset) else self._step(command)
        return Reply(self._observation(), self.success, self.done, self.length, frames)

    def _reset(self, command: Reset) -> list[np.ndarray]:
        self.command = command
        observation, _ = self.env.reset(seed=command.seed, options={"kind": command.kind})
        self.observations.clear()
        self.observations.append(observation)
        self.length, self.success, self.done, self.expert = 0, False, False, None
        return self._frame()

    def _step(self, command: Step) -> list[np.ndarray]:
        frames: list[np.ndarray] = []
        count = command.expert_steps if command.actions is None else len(command.actions)
        for index in range(count):
            action = self._expert_action() if command.actions is None else command.actions[index]
            observation, _, terminated, truncated, info = self.env.step(action)
            self.observations.append(observation)
            self.length += 1
            self.success = self.success or bool(info["success"])
            self.done = terminated or truncated
            frames += self._frame()
            if self.done:
                break
        return frames

    def _expert_action(self) -> np.ndarray:
        if self.expert is None:
            self.expert = self.suite.expert(self.env)
            self.expert.reset()
        return self.expert(self.observations[-1])

    def _frame(self) -> list[np.ndarray]:
        return [np.asarray(self.env.render())] if self.command.record else []

    def _observation(self) -> EnvObservation:
        history = self.observations.maxlen or 1
        if history == 1:
            return self.observations[-1]
        steps = [self.observations[0]] * (history - len(self.observations)) + list(self.observations)
        return {
            "images": {
                camera: np.stack([step["images"][camera] for step in steps]) for camera in steps[0]["images"]
            },
            "state": np.stack([step["state"] for step in steps]),
            "prompt": steps[-1]["prompt"],
        }


def serve(connection: Connection) -> None:
    """Answer commands until None comes or the parent goes away."""
    try:
        setup = connection.recv()
        sys.path[:] = setup["path"]
        suite: Suite = pickle.loads(setup["suite"])
        slots = {number: Slot(suite, setup["history"]) for number in setup["slots"]}
        connection.send(("ok", {}))
    except EOFError:
        return
    except Exception as error:
        connection.send(("error", f"making the environment failed: {_text(error)}", traceback.format_exc()))
        return
    while True:
        try:
            commands: dict[int, Any] | None = connection.recv()
        except EOFError:
            return
        if commands is None:
            break
        connection.send(_answer(slots, commands))
    for slot in slots.values():
        slot.env.close()


def _answer(slots: dict[int, Slot], commands: dict[int, Reset | Step]) -> tuple[Any, ...]:
    replies = {}
    for number, command in commands.items():
        slot = slots[number]
        try:
            replies[number] = slot.run(command)
        except Exception as error:
            episode = command if isinstance(command, Reset) else slot.command
            place = f"kind {episode.kind!r}, seed {episode.seed}, step {slot.length}"
            return ("error", f"{place}: {_text(error)}", traceback.format_exc())
    return ("ok", replies)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it closes the pipe
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    from librobot.evaluation import worker  # under its own name: commands are unpickled as its classes

    worker.main()
