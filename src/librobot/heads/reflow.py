"""Reflow (Liu et al. 2023, section 2.2): flow matching on pairs that a trained flow has made.

Noise and what the teacher draws from it lie on one path that crosses no other, so that the new flow is
straighter and needs fewer steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from librobot import replicas
from librobot.heads import ode_solvers
from librobot.heads.base import ActionHead, Denoiser, Mask
from librobot.heads.flow_matching import FlowMatching, TimeDistribution
from librobot.heads.teacher import Teacher


class Reflow(FlowMatching):
    """`teacher` is the checkpoint of a policy with a flow or diffusion head; `teacher_steps` the sampling
    steps that make a pair. The demonstrated actions are not looked at."""

    def __init__(
        self,
        *,
        teacher: str | None = None,
        teacher_steps: int = 20,
        time_distribution: TimeDistribution = "uniform",
        solver: ode_solvers.Solver = "euler",
        num_steps: int = 2,
        dim_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            time_distribution=time_distribution, solver=solver, num_steps=num_steps, dim_weights=dim_weights
        )
        if teacher_steps < 1:
            raise ValueError(f"teacher_steps must be at least 1, found {teacher_steps}")
        self.teacher, self.teacher_steps = Teacher(teacher), teacher_steps

    def teach(self, head: ActionHead, denoiser: Denoiser) -> None:
        """Take the trained pair, before training. Raises ValueError where its head has no path."""
        self.teacher.take(head, denoiser)

    def loss(
        self,
        denoiser: Denoiser,
        context: Any,
        actions: Float[Tensor, "b k a"],
        mask: Mask,
        *,
        noise: Float[Tensor, "b k a"] | None = None,
        time: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, " b"]:
        noise = replicas.randn_like(actions) if noise is None else noise
        with torch.no_grad():
            made = self.teacher.head.sample(
                self.teacher.denoiser,
                context,
                tuple(actions.shape),
                noise=noise,
                num_steps=self.teacher_steps,
            )
        return super().loss(denoiser, context, made.to(actions.dtype), mask, noise=noise, time=time)
