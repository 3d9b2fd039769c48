"""Helix at its two rates: system 2 thinks in a thread of its own, system 1 acts at every control step.

    control step        0  1  2  3  4  5  6  7       obs_steps = 2 and system2_hz = control_hz / 2
    system 2 starts     x     x     x     x          on that step's observation
    latent of step      0  0  0  2  2  4  4  6       that system 1 uses, where system 2 is fast enough

A latent of observation i is used from step i + obs_steps - 1 on, the age for which the policy was trained
(from i on, where it was trained for ages drawn at random), until a newer one is ready and as old. An episode
starts with the latent of its first observation, as the windows of its first steps did in training.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import repeat
from torch import Tensor

from librobot.errors import LibrobotError
from librobot.frameworks.helix import Helix
from librobot.frameworks.slow_thought import Plan, one_step
from librobot.policy import Policy
from librobot.types import Observation


class Thought(NamedTuple):
    """A latent, and the control step whose observation it came from."""

    step: int
    latent: Tensor


class TwoRatePolicy(Policy):
    """A Helix policy for one robot: `infer` is called at every control step with that step's observation, and
    raises what system 2 raised.

    `system2_hz` is how often system 2 starts, 1/s, at most the robot's control rate; where it is slower than
    that, it takes the newest observation as soon as it is free. `plan_hz` is how often it writes a new plan
    (None: at each start), for a policy that plans. With `wait` control waits until the latent of the trained
    age is ready: for simulations, whose clock stands still.

    `staleness` is the age of the latent that the last actions came from, in control steps;
    `trained_staleness` the least one. `reset` begins an episode. `close`, or leaving a `with` block, ends
    the thread.
    """

    framework: Helix

    def __init__(
        self,
        framework: Helix,
        *,
        system2_hz: float = 8.0,
        plan_hz: float | None = None,
        wait: bool = False,
        config: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(framework, Helix):
            raise LibrobotError(
                f"two rates need a policy of framework=helix, found {type(framework).__name__}; run it with "
                f"Policy"
            )
        super().__init__(framework, config=config, provenance=provenance, device=device)
        if not system2_hz > 0:
            raise ValueError(f"system2_hz must be above 0, found {system2_hz}")
        self.every = max(1, round(self.spec.control_hz / system2_hz))
        self.plan_every = 1 if plan_hz is None else max(1, round(system2_hz / plan_hz))
        self.wait = wait
        self.trained_staleness = framework.obs_steps - 1 if framework.offset == "fixed" else 0
        self.plan_text: str | None = None
        self.progress: np.ndarray | None = None
        self.num_thoughts = 0
        self._changed = threading.Condition()
        self._todo: tuple[int, int, Observation] | None = None
        self._busy = False
        self._closed = False
        self._failure: BaseException | None = None
        self._episode = 0
        self.reset()
        self._thread = threading.Thread(target=self._run_system2, name="system 2", daemon=True)
        self._thread.start()

    @property
    def obs_steps(self) -> int:
        """One: the window's earlier steps are what system 2 has seen by itself."""
        return 1

    def reset(self) -> None:
        """Forget the past: a new episode begins."""
        with self._changed:
            self._episode += 1
            self._step = 0
            self._todo = None
            self._thoughts: deque[Thought] = deque()
            self._plan: Plan | None = None
            self._starts = 0
            self.staleness = 0

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> TwoRatePolicy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _sample(self, observation: Observation, noise: Tensor | None) -> Tensor:
        """System 1 alone, on this control step's observation and the latent at hand."""
        if len(observation.state) != 1:
            raise LibrobotError(f"two rates are for one robot, found {len(observation.state)} observations")
        window = self.framework.prepare(self._as_window(observation))
        thought = self._newest_thought(window)
        actions, progress = self.framework.act(
            window, thought.latent, noise=noise, num_steps=self.num_steps, guidance=self.guidance
        )
        self.staleness = self._step - thought.step
        self._step += 1
        self.progress = None if progress is None else progress[0].cpu().numpy()
        return actions

    def _newest_thought(self, window: Observation) -> Thought:
        """Hand the observation to system 2 if it is due, and take the newest latent that is old enough."""
        now, wanted = self._step, max(0, self._step - self.trained_staleness)
        with self._changed:
            if now % self.every == 0:
                self._todo = (self._episode, now, window)
                self._changed.notify_all()
            due = wanted // self.every * self.every if self.wait else 0
            self._changed.wait_for(
                lambda: self._failure is not None or any(t.step >= due for t in self._thoughts)
            )
            if self._failure is not None:
                raise self._failure
            while len(self._thoughts) > 1 and self._thoughts[1].step <= wanted:
                self._thoughts.popleft()
            return self._thoughts[0]

    def _run_system2(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._todo is not None)
                if self._closed or self._todo is None:
                    return
                episode, step, window = self._todo
                self._todo = None
            try:
                latent = self._think(episode, window)
            except BaseException as error:  # control has to hear of it, whatever it is
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return
            with self._changed:
                if episode == self._episode:
                    self._thoughts.append(Thought(step, latent))
                    self.num_thoughts += 1
                self._changed.notify_all()

    def _think(self, episode: int, window: Observation) -> Tensor:
        with torch.inference_mode():
            seen = one_step(window, torch.zeros(1, dtype=torch.long, device=window.state.device))
            plan = None
            if self.framework.has_plan:
                with self._changed:
                    plan = self._plan if self._starts % self.plan_every else None
                    self._starts += 1
                if plan is None:
                    plan, words = self.framework.plan(seen)
                    with self._changed:
                        if episode == self._episode:
                            self._plan, self.plan_text = plan, words[0]
            latent = self.framework.think(seen, plan)
            if latent.is_cuda:
                torch.cuda.current_stream(latent.device).synchronize()
            return latent

    def _as_window(self, seen: Observation) -> Observation:
        """The step as a window of equal steps, which is what the framework prepares."""
        t = self.framework.obs_steps
        return Observation(
            images={name: repeat(x, "b 1 c h w -> b t c h w", t=t) for name, x in seen.images.items()},
            image_mask=seen.image_mask,
            state=repeat(seen.state, "b 1 s -> b t s", t=t),
            prompt=seen.prompt,
            embodiment=seen.embodiment,
        )
