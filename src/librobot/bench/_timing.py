"""Two calls timed in turns, so that a noisy machine disturbs both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def in_turns(
    ours: Callable[[], Any], peer: Callable[[], Any], *, rounds: int, warmup: int, device: str = "cpu"
) -> tuple[float, float]:
    """Median milliseconds of both over `rounds` calls of each, after `warmup` calls that do not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(warmup + rounds):
        sides = ((0, ours), (1, peer)) if number % 2 else ((1, peer), (0, ours))
        for side, call in sides:
            start = clock(device)
            call()
            spent = clock(device) - start
            if number >= warmup:
                times[side].append(1000 * spent)
    return statistics.median(times[0]), statistics.median(times[1])


def clock(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()
