"""Consistency distillation (Song et al. 2023, algorithm 2) of a trained flow or diffusion head.

    f(x_t, t) = x_t - t * v(x_t, t)        loss = d(v(x_t, t), (x_t - f(x_s, s)) / t without gradient)

on the straight path x_t = t * noise + (1 - t) * actions. x_s is where the teacher's equation leads from x_t,
and f(x, 0) = x holds by construction. So f maps any point of a path to its end, and one call of the network
draws actions. As in Song and Dhariwal 2024 (section 3.2) the target's network is the student.

Where this departs from the papers: they compare the two ends, which is this distance times t. Then the end of
a path, from which all else is learned, hardly counts, and a network that all times share forgets it: students
of long chunks came out worse than one step of their teacher. And they narrow the intervals during training.
Here the teacher crosses a wide one in several steps, so that few intervals lose nothing of its path, and what
the student learns at the end has few of them to travel; times are drawn from all of (0, 1], not from a grid.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from librobot import losses, replicas
from librobot.heads.base import ActionHead, Denoiser, Mask, at_least_one, further_noise, hold_last
from librobot.heads.teacher import Teacher

Distance = Literal["mse", "pseudo_huber"]
TeacherSolver = Literal["euler", "heun"]


class Consistency(ActionHead):
    """The denoiser predicts the mean velocity from a point to the path's end.

    `teacher` is the checkpoint of a policy with a flow or diffusion head. It goes from t to
    s = max(t - 1 / num_intervals, 0) in `teacher_steps` steps of `teacher_solver`. `distance`: mean squared
    error, or pseudo-Huber with Song and Dhariwal's constant (0.00054 * sqrt(elements) for a summed square is
    0.00054 for a mean one). `num_steps` above 1 goes back to a lower time with `fresh_noise` and
    maps again (Song et al. 2023, algorithm 1). Without it, it goes back with the noise that it started from:
    nearer to the teacher's answer for that noise where the spread of a mode is small beside the noise, but
    samples spread too widely.
    """

    generative: ClassVar[bool] = True

    def __init__(
        self,
        *,
        teacher: str | None = None,
        num_intervals: int = 5,
        teacher_steps: int = 2,
        teacher_solver: TeacherSolver = "heun",
        distance: Distance = "pseudo_huber",
        num_steps: int = 1,
        fresh_noise: bool = True,
        dim_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(dim_weights=dim_weights)
        for name, value, options in (
            ("teacher_solver", teacher_solver, get_args(TeacherSolver)),
            ("distance", distance, get_args(Distance)),
        ):
            if value not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}, found {value!r}")
        counts = (
            ("num_intervals", num_intervals),
            ("teacher_steps", teacher_steps),
            ("num_steps", num_steps),
        )
        for name, count in counts:
            if count < 1:
                raise ValueError(f"{name} must be at least 1, found {count}")
        self.teacher = Teacher(teacher)
        self.num_intervals, self.teacher_steps = num_intervals, teacher_steps
        self.teacher_solver, self.distance = teacher_solver, distance
        self.num_steps, self.fresh_noise = num_steps, fresh_noise

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
        actions = hold_last(actions, mask).float()
        noise = replicas.randn_like(actions) if noise is None else noise.float()
        if time is None:
            time = 1 - replicas.draw(lambda n: torch.rand(n, device=actions.device), len(actions))
        here = time.float()
        here = here.clamp_min(1e-3)  # an end's rounding is divided by it
        there = (here - 1 / self.num_intervals).clamp_min(0)
        t = here[:, None, None]
        x_t = t * noise + (1 - t) * actions
        with torch.no_grad():
            x_s = self._teacher_path(x_t, here, there, context)
            target = (x_t - self.end(denoiser, x_s, there, context)) / t
        return self._distance(denoiser(x_t.to(self.anchor.dtype), here, context).float(), target, mask)

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
        """`noise` may have a leading axis of `num_steps`: the first entry starts, the others are those that
        further steps go back with. Without it these follow from the first (`further_noise`), or are the first
        again (`fresh_noise`)."""
        self.no_guidance(guidance)
        num_steps = self.num_steps if num_steps is None else at_least_one(num_steps)
        noise = self.draw_noise(shape) if noise is None else noise
        given = noise.ndim == 4
        x_t = first = (noise[0] if given else noise).float()
        for step in range(num_steps):
            time = torch.full((shape[0],), 1.0 - step / num_steps, device=x_t.device)
            if step:
                back = (
                    noise[step].float()
                    if given
                    else further_noise(first, step)
                    if self.fresh_noise
                    else first
                )
                x_t = time[0] * back + (1 - time[0]) * x_t
            x_t = self.end(denoiser, x_t, time, context)
        return x_t

    def end(
        self, denoiser: Denoiser, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], context: Any
    ) -> Float[Tensor, "b k a"]:
        """f: the end of the path through x_t, in float32."""
        return x_t - time[:, None, None] * denoiser(x_t.to(self.anchor.dtype), time, context).float()

    def _teacher_path(self, x: Tensor, here: Tensor, there: Tensor, context: Any) -> Tensor:
        times = [torch.lerp(here, there, step / self.teacher_steps) for step in range(self.teacher_steps)]
        for start, stop in itertools.pairwise([*times, there]):
            x = self._teacher_step(x, start, stop, context)
        return x

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
