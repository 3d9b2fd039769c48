"""Two calls timed in turns, so that a noisy machine disturbs both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def in_turns(
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    *,
    rounds: int,
    warmup: int,
    device: str = "cpu",
    read: Callable[[str], float] | None = None,
) -> tuple[float, float]:
    """Median milliseconds of both over `rounds` calls of each, after `warmup` calls that do not count, by
    the clock `read` (None: the wall's)."""
    read = read or clock
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(warmup + rounds):
        sides = ((0, ours), (1, peer)) if number % 2 else ((1, peer), (0, ours))
        for side, call in sides:
            start = read(device)
            call()
            spent = read(device) - start
            if number >= warmup:
                times[side].append(1000 * spent)
    return statistics.median(times[0]), statistics.median(times[1])


def clock(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def process_clock(device: str) -> float:
    """Seconds that this process has computed, whatever else the machine does."""
    return time.process_time()
