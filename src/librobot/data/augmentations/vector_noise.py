"""Noise on states and on actions, in the measure of each dimension's own spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from librobot.data.augmentations.base import check_share, generator_for
from librobot.types import Batch, Dim, RobotSpec


class VectorNoise:
    """std: of Gaussian noise, as a share of each dimension's standard deviation over the dataset. leave:
    kinds of dimension without noise. Raises ValueError for a std outside [0, 10]."""

    key = ""  # state or action

    def __init__(self, *, std: float = 0.02, leave: Sequence[str] = ("gripper",)) -> None:
        self.std, self.leave = check_share("std", std, 10.0), tuple(leave)
        self.scale: Float[Tensor, "robots dim"] | None = None

    def learn(
        self, robots: Sequence[RobotSpec], statistics: Sequence[Mapping[str, Mapping[str, np.ndarray]]]
    ) -> None:
        each = [
            self._scale(getattr(robot, self.key), own[self.key]["std"])
            for robot, own in zip(robots, statistics, strict=True)
        ]
        width = max(len(row) for row in each)
        self.scale = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in each])

    def _scale(self, dims: Sequence[Dim], std: np.ndarray) -> Float[Tensor, " dim"]:
        moved = [0.0 if dim.kind in self.leave else self.std for dim in dims]
        return torch.tensor(moved) * torch.as_tensor(std, dtype=torch.float32)[: len(dims)]

    def disturb(self, values: Float[Tensor, "b t dim"], batch: Batch, seed: Sequence[int]) -> Tensor:
        if self.scale is None:
            raise ValueError(f"{type(self).__name__} has to learn the dataset's statistics first")
        robots = batch.embodiment
        scale = self.scale[torch.zeros(len(values), dtype=torch.long) if robots is None else robots.cpu()]
        scale = torch.nn.functional.pad(scale, (0, values.shape[-1] - scale.shape[-1]))[:, None]
        noise = torch.randn(values.shape, generator=generator_for(seed)) * scale
        return values + noise.to(values)


class StateNoise(VectorNoise):
    """On the states that the policy sees: it learns to correct what a small error leads to, and to trust a
    state less. Each step of a window has its own. A state that a framework writes into its prompt (pi0.5,
    pi0-FAST) is written in a data worker, before."""

    key = "state"

    def __call__(self, batch: Batch, *, seed: Sequence[int]) -> Batch:
        state = self.disturb(batch.observation.state, batch, seed)
        return replace(batch, observation=replace(batch.observation, state=state))


class ActionNoise(VectorNoise):
    """On the actions that the policy learns, as the policy sees them (relative ones, with
    actions=relative). Each step of a chunk has its own."""

    key = "action"

    def __call__(self, batch: Batch, *, seed: Sequence[int]) -> Batch:
        return replace(batch, actions=self.disturb(batch.actions, batch, seed))
