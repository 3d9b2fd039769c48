"""One batch over several processes: draws and means that come out as if one process had all of its samples.

Training says which part of the batch this process has (`part`). Outside of it there is one part, the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Part:
    """The `rank`-th of `count` equal parts of a batch; `seed` is the batch's, the same in all of them.

    `group` are the processes that have the parts (None: all of the run's).
    """

    rank: int
    count: int
    seed: int
    group: Any = None
    draws: int = 0


_part: ContextVar[Part | None] = ContextVar("part", default=None)


@contextmanager
def part(mine: Part) -> Iterator[None]:
    """What is computed in here is computed of that part of a batch."""
    token = _part.set(mine)
    try:
        yield
    finally:
        _part.reset(token)


def draw(make: Callable[[int], Tensor], count: int) -> Tensor:
    """`make(n)` draws n rows from torch's random numbers; this gives the `count` rows of this part.

    In training they are a function of the batch's seed and of how many draws came before, whatever else
    draws (dropout) and in however many parts the batch is. Torch's generators go on as if nothing had been
    drawn.
    """
    mine = _part.get()
    if mine is None:
        return make(count)
    mine.draws += 1
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((mine.seed + mine.draws) % 2**63)
        rows = make(count * mine.count)
    return rows[mine.rank * count : (mine.rank + 1) * count]


def randn_like(x: Tensor) -> Tensor:
    """Standard normal rows of the shape of `x`, whose first axis is the batch."""
    return draw(lambda n: torch.randn((n, *x.shape[1:]), dtype=x.dtype, device=x.device), len(x))


def mean(x: Tensor) -> Tensor:
    """The mean of `x` over the parts; without a gradient where there are several."""
    mine = _part.get()
    if mine is None or mine.count == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total, group=mine.group)
    return total / mine.count
