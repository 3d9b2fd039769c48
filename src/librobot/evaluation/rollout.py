"""Closed-loop episodes: environments step in processes, the policy answers for all of them in one batch.

Every slot runs one episode at a time. A wave is one batched policy call for the slots that need actions,
then one command to every slot: execute these actions, or start the next episode. Scenes depend on the
episode's seed only, and so does the noise of a generative policy, so results do not depend on `num_envs`,
except through rounding: a batched matrix product may differ in its last bits with the size of the batch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from librobot.chunking import ChunkExecutor
from librobot.errors import LibrobotError, nearest
from librobot.evaluation.controls import Transform
from librobot.evaluation.episode import Episode, EpisodeResult, PolicyCall, plan
from librobot.evaluation.pool import EnvPool
from librobot.evaluation.worker import Reply, Reset, Step
from librobot.progress import ProgressBar
from librobot.sim.base import Suite
from librobot.types import RobotSpec

EXPERT_STEPS = 10  # steps that the expert takes between two waves
NOISE_STRIDE = 100_000  # above any episode's length


class BatchPolicy(Protocol):
    """What the loop needs of a policy (`librobot.policy.Policy`)."""

    @property
    def spec(self) -> RobotSpec: ...

    @property
    def horizon(self) -> int: ...

    def infer_batch(self, observations: list[dict[str, Any]]) -> list[dict[str, Any]]: ...


class TimedPolicy:
    """A policy that notes the size and the wall time of each of its calls in `calls`."""

    def __init__(self, policy: BatchPolicy) -> None:
        self.policy, self.spec, self.horizon = policy, policy.spec, policy.horizon
        self.obs_steps: int = getattr(policy, "obs_steps", 1)
        self.calls: list[PolicyCall] = []

    def infer_batch(self, observations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        started = time.perf_counter()
        answers = self.policy.infer_batch(observations)
        self.calls.append(PolicyCall(len(observations), time.perf_counter() - started))
        return answers


class ExpertPolicy:
    """Stands for the suite's scripted expert, which acts in the environments' own processes."""


class _Run:
    """The episode that a slot is in, and what happened in it so far."""

    def __init__(self, episode: Episode, executor: ChunkExecutor | None, record: bool) -> None:
        self.episode, self.executor = episode, executor
        self.reset = Reset(episode.kind, episode.seed, record)
        self.prompt: str | None = None
        self.frames: list[np.ndarray] = []
        self.reply: Reply | None = None

    def update(self, reply: Reply) -> None:
        if self.prompt is None:
            self.prompt = reply.observation["prompt"]
        self.frames += reply.frames
        self.reply = reply

    def result(self) -> EpisodeResult:
        assert self.reply is not None
        assert self.prompt is not None
        episode, reply = self.episode, self.reply
        return EpisodeResult(
            episode.index, episode.kind, episode.seed, self.prompt, reply.success, reply.length, self.frames
        )


def evaluate_policy(
    policy: BatchPolicy | ExpertPolicy,
    suite: Suite,
    *,
    episodes: int,
    seed: int = 0,
    num_envs: int = 8,
    num_workers: int | None = None,
    kinds: Sequence[str] | None = None,
    execute_steps: int | None = None,
    ensemble: float | None = None,
    transform: Transform | None = None,
    videos_per_kind: int = 0,
    progress: bool = True,
    title: str = "evaluate",
) -> list[EpisodeResult]:
    """Run episodes to their end; one result each, in the order of `librobot.evaluation.episode.plan`.

    `transform` changes what the policy sees (see `librobot.evaluation.controls`). The first
    `videos_per_kind` episodes of each kind keep their pictures. Raises LibrobotError for impossible
    options, a policy that does not fit the suite, and a failing environment.
    """
    planned = plan(suite, episodes, seed=seed, kinds=kinds)
    check_fit(policy, suite)
    try:
        executor_of(policy, execute_steps, ensemble)
    except ValueError as error:
        raise LibrobotError(str(error)) from error
    waiting = deque(planned)
    recorded = _recorded(planned, videos_per_kind)

    def begin(episode: Episode) -> _Run:
        executor = executor_of(policy, execute_steps, ensemble)
        return _Run(episode, executor, record=episode.index in recorded)

    results: list[EpisodeResult] = []
    slots = min(num_envs, len(planned))
    history = getattr(policy, "obs_steps", 1)
    with (
        EnvPool(suite, slots, num_workers=num_workers, history=history) as pool,
        ProgressBar(title, len(planned), show=progress) as bar,
    ):
        runs = {slot: begin(waiting.popleft()) for slot in range(slots)}
        commands: dict[int, Reset | Step] = {slot: run.reset for slot, run in runs.items()}
        while commands:
            replies = pool.run(commands)
            commands, acting = {}, {}
            for slot, reply in replies.items():
                runs[slot].update(reply)
                if not reply.done:
                    acting[slot] = runs[slot]
                    continue
                results.append(runs[slot].result())
                bar.advance(note=f"success {100 * sum(r.success for r in results) / len(results):.0f}%")
                if waiting:
                    runs[slot] = begin(waiting.popleft())
                    commands[slot] = runs[slot].reset
            commands |= _next_steps(policy, acting, transform)
    return sorted(results, key=lambda result: result.index)


def executor_of(
    policy: BatchPolicy | ExpertPolicy, execute_steps: int | None, ensemble: float | None
) -> ChunkExecutor | None:
    """What turns the policy's chunks into actions; None for the expert, which gives one at a time."""
    if isinstance(policy, ExpertPolicy):
        return None
    return ChunkExecutor(policy.horizon, execute_steps, ensemble)


def _next_steps(
    policy: BatchPolicy | ExpertPolicy, acting: dict[int, _Run], transform: Transform | None
) -> dict[int, Step]:
    """What every running episode does next: one batched policy call, then as many actions as stand fast."""
    if isinstance(policy, ExpertPolicy):
        return {slot: Step(None, EXPERT_STEPS) for slot in acting}
    if not acting:
        return {}
    observations = [_seen(run, transform) for run in acting.values()]
    answers = policy.infer_batch(observations)
    steps = {}
    for (slot, run), answer in zip(acting.items(), answers, strict=True):
        assert run.executor is not None
        steps[slot] = Step(run.executor.add(answer["actions"]))
    return steps


def _seen(run: _Run, transform: Transform | None) -> dict[str, Any]:
    assert run.reply is not None
    # Policy.infer_batch fixes a generative policy's noise by this number, whatever else is in the batch.
    noise_seed = run.episode.seed * NOISE_STRIDE + run.reply.length
    observation: dict[str, Any] = {**run.reply.observation, "seed": noise_seed}
    return observation if transform is None else transform(observation, run.episode)


def _recorded(planned: Sequence[Episode], per_kind: int) -> set[int]:
    """Indices of the first `per_kind` episodes of each kind: chosen before anything is known of them."""
    seen: dict[str, list[int]] = {}
    for episode in planned:
        seen.setdefault(episode.kind, []).append(episode.index)
    return {index for indices in seen.values() for index in indices[:per_kind]}


def check_fit(policy: BatchPolicy | ExpertPolicy, suite: Suite) -> None:
    """Refuse a policy whose cameras, state or actions are not the suite's. Raises LibrobotError.

    The policy may use fewer cameras than the suite has; sizes and dimensions must agree by name.
    """
    if isinstance(policy, ExpertPolicy):
        return
    theirs, ours = policy.spec, suite.spec
    place = f"the policy was trained for {theirs.name!r}, which does not fit the suite {suite.name!r}"
    sizes = {camera.name: camera for camera in ours.cameras}
    for camera in theirs.cameras:
        found = sizes.get(camera.name)
        if found is None:
            hint = nearest(camera.name, sizes)
            raise LibrobotError(f"{place}: it needs the camera {camera.name!r}; {hint}")
        if camera != found:
            raise LibrobotError(
                f"{place}: camera {camera.name!r} gave {camera.height} x {camera.width} pixels in training "
                f"and gives {found.height} x {found.width} here; set the suite's image size to training's"
            )
    for part in ("state", "action"):
        expected, given = ([dim.name for dim in getattr(spec, part)] for spec in (theirs, ours))
        if expected != given:
            raise LibrobotError(f"{place}: its {part} dimensions are {expected}, the suite's are {given}")
