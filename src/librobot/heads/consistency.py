"""Consistency distillation (Song et al. 2023, algorithm 2) of a trained flow or diffusion head.

    f(x_t, t) = x_t - t * v(x_t, t)        loss = d(f(x_t, t), f(x_s, s) without gradient)

on the straight path x_t = t * noise + (1 - t) * actions. x_s is where one step of the teacher's equation
leads from x_t, and f(x, 0) = x holds by construction. So f maps any point of a path to its end, and one call
of the network draws actions. As in Song and Dhariwal 2024 (section 3.2) the target's network is the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from librobot import losses
from librobot.heads.base import ActionHead, Denoiser, Mask, at_least_one, further_noise, hold_last
from librobot.heads.teacher import Teacher

Distance = Literal["mse", "pseudo_huber"]
TeacherSolver = Literal["euler", "heun"]


class Consistency(ActionHead):
    """The denoiser predicts the mean velocity from a point to the path's end.

    `teacher` is the checkpoint of a policy with a flow or diffusion head. `num_intervals` is the number of
    times between which the teacher steps by `teacher_solver`. `distance`: mean squared error, or pseudo-Huber
    with Song and Dhariwal's constant (0.00054 * sqrt(elements) for a summed square is 0.00054 for a mean
    one). `num_steps` above 1 adds noise again and maps again (Song et al. 2023, algorithm 1).
    """

    generative: ClassVar[bool] = True

    def __init__(
        self,
        *,
        teacher: str | None = None,
        num_intervals: int = 20,
        teacher_solver: TeacherSolver = "heun",
        distance: Distance = "mse",
        num_steps: int = 1,
        dim_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(dim_weights=dim_weights)
        for name, value, options in (
            ("teacher_solver", teacher_solver, get_args(TeacherSolver)),
            ("distance", distance, get_args(Distance)),
        ):
            if value not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}, found {value!r}")
        for name, count in (("num_intervals", num_intervals), ("num_steps", num_steps)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, found {count}")
        self.teacher = Teacher(teacher)
        self.num_intervals, self.teacher_solver = num_intervals, teacher_solver
        self.distance, self.num_steps = distance, num_steps

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
        """A given `time` stands for the nearest of the 1 / num_intervals, 2 / num_intervals, ... 1."""
        actions = hold_last(actions, mask).float()
        noise = torch.randn_like(actions) if noise is None else noise.float()
        if time is None:
            number = torch.randint(1, self.num_intervals + 1, (len(actions),), device=actions.device)
        else:
            number = (time * self.num_intervals).round().long().clamp(1, self.num_intervals)
        here, there = number / self.num_intervals, (number - 1) / self.num_intervals
        t = here[:, None, None]
        x_t = t * noise + (1 - t) * actions
        with torch.no_grad():
            target = self.end(denoiser, self._teacher_step(x_t, here, there, context), there, context)
        return self._distance(self.end(denoiser, x_t, here, context), target, mask)

    def sample(
        self,
        denoiser: Denoiser,
        context: Any,
        shape: tuple[int, int, int],
        *,
        noise: Float[Tensor, "*steps b k a"] | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
    ) -> Float[Tensor, "b k a"]:
        """`noise` may have a leading axis of `num_steps`: the first entry starts, the others are added before
        each further step. Without it these follow from the first (`further_noise`)."""
        self.no_guidance(guidance)
        num_steps = self.num_steps if num_steps is None else at_least_one(num_steps)
        noise = self.draw_noise(shape) if noise is None else noise
        added = None if noise.ndim == 3 else noise[1:]
        x_t = (noise if noise.ndim == 3 else noise[0]).float()
        for step in range(num_steps):
            time = torch.full((shape[0],), 1.0 - step / num_steps, device=x_t.device)
            if step:
                fresh = further_noise(noise, step) if added is None else added[step - 1].float()
                x_t = time[0] * fresh + (1 - time[0]) * x_t
            x_t = self.end(denoiser, x_t, time, context)
        return x_t

    def end(
        self, denoiser: Denoiser, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], context: Any
    ) -> Float[Tensor, "b k a"]:
        """f: the end of the path through x_t, in float32."""
        return x_t - time[:, None, None] * denoiser(x_t.to(self.anchor.dtype), time, context).float()

    def _teacher_step(self, x: Tensor, here: Tensor, there: Tensor, context: Any) -> Tensor:
        size = (here - there)[:, None, None]
        v = self.teacher.velocity(x, here, context)
        if self.teacher_solver == "heun":
            # No correction where the step ends at 0 (Karras et al. 2022, algorithm 1): the velocity of a
            # diffusion teacher has its error divided by the time.
            last = there == 0
            ahead = self.teacher.velocity(x - size * v, torch.where(last, here, there), context)
            v = torch.where(last[:, None, None], v, 0.5 * (v + ahead))
        return x - size * v

    def _distance(self, found: Tensor, target: Tensor, mask: Mask) -> Float[Tensor, " b"]:
        squared = losses.mse(found, target, mask, self.dim_weights)
        if self.distance == "mse":
            return squared
        c = 0.00054
        return squared / ((squared + c**2).sqrt() + c)  # sqrt(squared + c^2) - c, without cancellation
