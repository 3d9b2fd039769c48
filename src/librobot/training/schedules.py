"""Learning-rate schedules as the `scheduler=` group makes them: a factor per optimiser step.

A factory is called as `factory(optimizer, total_steps=...)`. `total_steps` is what the trainer expects to
run, or None where it cannot know (only a time limit was given); a `decay_steps` in the configuration
replaces it. The factor multiplies each parameter group's own learning rate. Warm-up rises linearly from 1 /
(warmup_steps + 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from librobot.errors import LibrobotError


def constant(optimizer: Optimizer, *, total_steps: int | None, warmup_steps: int = 0) -> LambdaLR:
    """Warm-up, then a flat learning rate."""
    return _schedule(optimizer, warmup_steps, lambda step: 1.0)


def cosine(
    optimizer: Optimizer,
    *,
    total_steps: int | None,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    final_factor: float = 0.0,
) -> LambdaLR:
    """Warm-up, then half a cosine down to `final_factor` at step `decay_steps` (counted from the start)."""
    end = _end("cosine", total_steps, decay_steps)

    def factor(step: int) -> float:
        progress = _progress(step, warmup_steps, end)
        return final_factor + (1.0 - final_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return _schedule(optimizer, warmup_steps, factor)


def linear(
    optimizer: Optimizer,
    *,
    total_steps: int | None,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    final_factor: float = 0.0,
) -> LambdaLR:
    """Warm-up, then a straight line down to `final_factor` at step `decay_steps` (counted from the start)."""
    end = _end("linear", total_steps, decay_steps)

    def factor(step: int) -> float:
        return 1.0 - (1.0 - final_factor) * _progress(step, warmup_steps, end)

    return _schedule(optimizer, warmup_steps, factor)


def warmup_stable_decay(
    optimizer: Optimizer,
    *,
    total_steps: int | None,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    decay_fraction: float = 0.2,
    final_factor: float = 0.0,
) -> LambdaLR:
    """Warm-up, flat, then a line to `final_factor` over the last `decay_fraction` (Hu et al. 2024)."""
    if not 0 < decay_fraction <= 1:
        raise ValueError(f"decay_fraction must lie in (0, 1], found {decay_fraction}")
    end = _end("warmup_stable_decay", total_steps, decay_steps)
    start = max(warmup_steps, round(end * (1.0 - decay_fraction)))

    def factor(step: int) -> float:
        return 1.0 - (1.0 - final_factor) * _progress(step, start, end)

    return _schedule(optimizer, warmup_steps, factor)


def rsqrt(
    optimizer: Optimizer, *, total_steps: int | None, warmup_steps: int = 0, timescale: float = 10_000
) -> LambdaLR:
    """Warm-up, then 1 / sqrt(1 + (step - warmup_steps) / timescale), as published for Octo (Zhai et al.
    2022): training may end, or go on, at any step."""
    if timescale <= 0:
        raise ValueError(f"timescale must be above 0, found {timescale}")
    return _schedule(
        optimizer, warmup_steps, lambda step: (1.0 + max(0, step - warmup_steps) / timescale) ** -0.5
    )


def one_cycle(
    optimizer: Optimizer,
    *,
    total_steps: int | None,
    decay_steps: int | None = None,
    warmup_fraction: float = 0.3,
    initial_factor: float = 0.04,
    final_factor: float = 4e-6,
) -> LambdaLR:
    """Half a cosine up from `initial_factor` over `warmup_fraction` of training, and one down to
    `final_factor` (Smith and Topin 2019; the defaults and shape of torch's OneCycleLR, without its cycle of
    the momentum)."""
    if not 0 < warmup_fraction < 1:
        raise ValueError(f"warmup_fraction must lie in (0, 1), found {warmup_fraction}")
    end = _end("one_cycle", total_steps, decay_steps) - 1  # the last step's own number
    top = warmup_fraction * (end + 1) - 1

    def between(first: float, last: float, progress: float) -> float:
        return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * progress))

    def factor(step: int) -> float:
        if step < top:
            return between(initial_factor, 1.0, step / top)
        return between(1.0, final_factor, min(1.0, (step - top) / max(1.0, end - top)))

    return _schedule(optimizer, 0, factor)


def _schedule(optimizer: Optimizer, warmup_steps: int, factor: Callable[[int], float]) -> LambdaLR:
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must not be negative, found {warmup_steps}")

    def warmed(step: int) -> float:
        return min(1.0, (step + 1) / (warmup_steps + 1)) * factor(step)

    return LambdaLR(optimizer, warmed)


def _progress(step: int, start: int, end: int) -> float:
    """0 up to `start`, 1 from `end` on."""
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))


def _end(name: str, total_steps: int | None, decay_steps: int | None) -> int:
    end = total_steps if decay_steps is None else decay_steps
    if end is None:
        raise LibrobotError(
            f"scheduler={name} must know when training ends, and the trainer gives no number of steps; "
            f"set trainer.max_steps, or scheduler.decay_steps, or take scheduler=constant"
        )
    return end
