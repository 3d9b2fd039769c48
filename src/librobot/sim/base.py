"""The seam between librobot and simulators: what a suite of language-given tasks provides."""

from __future__ import annotations

from typing import Any, Protocol, TypedDict, runtime_checkable

import gymnasium
import numpy as np
from jaxtyping import Float, UInt8

from librobot.types import RobotSpec

# Scenes are drawn from the seed of `reset`, so disjoint ranges keep evaluation scenes unseen.
DEMONSTRATION_SEEDS = range(0, 1_000_000)
EVALUATION_SEEDS = range(1_000_000, 2_000_000)


class EnvObservation(TypedDict):
    """What `reset` and `step` return. Images are (h, w, 3); the state is in physical units."""

    images: dict[str, UInt8[np.ndarray, "h w 3"]]
    state: Float[np.ndarray, " s"]
    prompt: str


class Expert(Protocol):
    """A scripted policy that may look at the simulator's true state."""

    def reset(self) -> None:
        """Start a new episode; called after the environment's own `reset`."""

    def __call__(self, observation: EnvObservation) -> Float[np.ndarray, " a"]:
        """The clean action for this step."""


@runtime_checkable
class Suite(Protocol):
    """A family of tasks for one robot: light, picklable, and able to make environments in any process.

    Environments are `gymnasium.Env`: `reset(seed=, options={"kind": name})` and `step(action)` return an
    `EnvObservation` and `info["kind"]`, `info["success"]`; success terminates the episode, the kind's
    step limit truncates it; `render()` gives a larger picture for videos.
    """

    name: str
    spec: RobotSpec
    kinds: tuple[str, ...]
    noise_scale: Float[np.ndarray, " a"]
    """Standard deviation, per action dimension, of a fair disturbance: what recording at noise=1 adds."""

    @property
    def renderer(self) -> str:
        """The rendering back end that `make` would use here: it changes the pixels."""

    def make(self) -> gymnasium.Env:
        """A new environment."""

    def expert(self, env: gymnasium.Env) -> Expert:
        """The scripted expert of `env`, which must come from `make`."""

    def to_dict(self) -> dict[str, Any]:
        """A description in plain types, stored with datasets and checkpoints."""
