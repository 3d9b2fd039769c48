"""Recording a scripted expert's demonstrations into a LeRobotDataset v3.0.

Noise is added to the action that is executed, while the expert's clean action is what is stored: the data
then hold states that the expert alone would not visit, with the action that leads back (DART, Laskey et al.
2017). Only successful episodes are kept. Episode `i` depends on `i`, the seed and the suite alone, so that
neither the number of workers nor an interruption changes the dataset.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from jaxtyping import Float, UInt8

from librobot.data.writer import LeRobotWriter
from librobot.errors import LibrobotError, nearest
from librobot.progress import ProgressBar
from librobot.sim.base import DEMONSTRATION_SEEDS, EnvObservation, Expert, Suite

if TYPE_CHECKING:
    from omegaconf import DictConfig

ATTEMPTS = 10  # scenes tried for one episode before the recording gives up
CLEAN_SHARE = 1 / 3  # of the episodes, recorded without noise
FORMAT = 2  # raise when what an equal configuration records changes


@dataclass
class Demonstration:
    """One successful episode: T observations, and the clean action for each."""

    images: dict[str, UInt8[np.ndarray, "T h w 3"]]
    state: Float[np.ndarray, "T s"]
    action: Float[np.ndarray, "T a"]
    prompt: str


class EpisodeRecorder:
    """Plays the expert in one environment. Picklable: the environment is made at first use."""

    def __init__(self, suite: Suite, *, kinds: Sequence[str], seed: int, noise: float) -> None:
        self.suite, self.kinds, self.seed, self.noise = suite, tuple(kinds), seed, noise
        self._env: gymnasium.Env | None = None

    def __call__(self, index: int) -> Demonstration:
        """Episode `index`. Its kind of task follows from the index, its scene from the index and the seed."""
        if self._env is None:
            self._env = self.suite.make()
        expert = self.suite.expert(self._env)
        kind = self.kinds[index % len(self.kinds)]
        for attempt in range(ATTEMPTS):
            scene = self.seed + index * ATTEMPTS + attempt
            if scene not in DEMONSTRATION_SEEDS:
                raise LibrobotError(
                    f"demonstrations use scenes {DEMONSTRATION_SEEDS}, but episode {index} with "
                    f"seed={self.seed} would need {scene}; lower episodes or seed"
                )
            if (episode := self._play(expert, self._env, kind, scene)) is not None:
                return episode
        raise LibrobotError(
            f"{self.suite.name}: the expert failed {kind!r} in {ATTEMPTS} scenes in a row (episode {index}); "
            f"lower noise (now {self.noise})"
        )

    def _play(self, expert: Expert, env: gymnasium.Env, kind: str, scene: int) -> Demonstration | None:
        generator = np.random.default_rng([scene, 1])
        noise = 0.0 if generator.random() < CLEAN_SHARE else self.noise
        observation, _ = env.reset(seed=scene, options={"kind": kind})
        expert.reset()
        observations: list[EnvObservation] = []
        actions = []
        done, info = False, {"success": False}
        while not done:
            action = expert(observation)
            observations.append(observation)
            actions.append(action)
            disturbance = noise * self.suite.noise_scale * generator.standard_normal(len(action))
            observation, _, terminated, truncated, info = env.step((action + disturbance).astype(np.float32))
            done = terminated or truncated
        if not info["success"]:
            return None
        cameras = observations[0]["images"]
        return Demonstration(
            images={name: np.stack([o["images"][name] for o in observations]) for name in cameras},
            state=np.stack([o["state"] for o in observations]).astype(np.float32),
            action=np.stack(actions).astype(np.float32),
            prompt=observations[0]["prompt"],
        )


def record_demonstrations(
    suite: Suite,
    root: Path,
    *,
    episodes: int,
    kinds: Sequence[str] | None = None,
    seed: int = 0,
    noise: float = 1.0,
    num_workers: int = 1,
    image_format: str = "image",
    resume: bool = True,
) -> Path:
    """Record until the dataset at `root` holds `episodes` demonstrations.

    The `kinds` of task take turns in this order (default: the suite's); one that is named twice gets twice as
    many episodes. `noise` multiplies the suite's `noise_scale`. With `resume`, an interrupted recording
    goes on where it stopped; what was complete is kept. Returns `root`.
    """
    if episodes < 1 or num_workers < 0 or noise < 0:
        raise LibrobotError(
            f"recording needs episodes >= 1, num_workers >= 0 and noise >= 0; "
            f"found episodes={episodes}, num_workers={num_workers}, noise={noise}"
        )
    kinds = check_kinds(suite, kinds)
    settings = {"kinds": list(kinds), "seed": seed, "noise": noise, "format": FORMAT}
    metadata = {"renderer": suite.renderer, "env": suite.to_dict(), "recording": settings}
    with LeRobotWriter(
        root,
        suite.spec,
        fps=round(suite.spec.control_hz),
        image_format="video" if image_format == "video" else "image",
        metadata=metadata,
        resume=resume,
    ) as writer:
        recorder = EpisodeRecorder(suite, kinds=kinds, seed=seed, noise=noise)
        left = range(writer.num_episodes, episodes)
        try:
            with ProgressBar(f"recording {suite.name} ({suite.renderer})", len(left)) as bar:
                for demonstration in _episodes(recorder, left, num_workers):
                    writer.add_episode(
                        images=demonstration.images,
                        state=demonstration.state,
                        action=demonstration.action,
                        task=demonstration.prompt,
                    )
                    bar.advance()
        except (KeyboardInterrupt, SystemExit):
            writer.finalize()
            print(
                f"\nstopped: {writer.num_episodes} of {episodes} episodes are in {root}; "
                "the same command goes on"
            )
            raise
    return root


def check_kinds(suite: Suite, kinds: Sequence[str] | None) -> tuple[str, ...]:
    """`kinds`, or the suite's. Raises LibrobotError for one that the suite does not have."""
    for kind in kinds or ():
        if kind not in suite.kinds:
            raise LibrobotError(f"{suite.name} has no kind of task {kind!r}; {nearest(kind, suite.kinds)}")
    return tuple(kinds or suite.kinds)


def _episodes(recorder: EpisodeRecorder, indices: range, num_workers: int) -> Iterator[Demonstration]:
    """The episodes in order, played in this process or in `num_workers` fresh ones."""
    if num_workers <= 1 or len(indices) <= 1:
        yield from map(recorder, indices)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(num_workers, len(indices)), _start_worker, (recorder,)) as pool:
        yield from pool.imap(_play_in_worker, indices, chunksize=4)


_recorder: EpisodeRecorder | None = None  # of this worker process


def _start_worker(recorder: EpisodeRecorder) -> None:
    global _recorder
    _recorder = recorder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool


def _play_in_worker(index: int) -> Demonstration:
    assert _recorder is not None
    return _recorder(index)


def ensure_demonstrations(
    suite: Suite,
    *,
    episodes: int,
    cache_dir: str | Path,
    kinds: Sequence[str] | None = None,
    seed: int = 0,
    noise: float = 1.0,
    num_workers: int = 1,
) -> Path:
    """The folder of these demonstrations, recorded first where the cache does not hold them yet.

    The folder's name carries a hash of everything that shapes the data.
    """
    key: dict[str, Any] = {
        "env": suite.to_dict(), "episodes": episodes, "kinds": check_kinds(suite, kinds),
        "seed": seed, "noise": noise, "format": FORMAT,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]
    root = Path(cache_dir).expanduser() / "demonstrations" / f"{suite.name}-{episodes}-{digest}"
    info = root / "meta" / "info.json"
    if info.exists() and json.loads(info.read_text())["total_episodes"] == episodes:
        return root
    return record_demonstrations(
        suite, root, episodes=episodes, kinds=kinds, seed=seed, noise=noise, num_workers=num_workers
    )


def record(cfg: DictConfig) -> Path:
    """`librobot-record`: build the suite and record into `cfg.output`."""
    from librobot.config.build import build_suite

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    root = record_demonstrations(
        build_suite(cfg.env),
        Path(cfg.output).expanduser(),
        episodes=cfg.episodes,
        kinds=cfg.kinds,
        seed=cfg.seed,
        noise=cfg.noise,
        num_workers=cfg.num_workers,
        image_format=cfg.image_format,
        resume=cfg.resume,
    )
    print(f"{cfg.episodes} episodes in {root}; look at them with: librobot-data info {root}")
    return root
