"""A least-recently-used cache that each thread of each process has for itself."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class LocalCache[Key: Hashable, Value]:
    """Values made by `load(key)`, the least recently used ones dropped when their costs exceed `capacity`.

    Open decoders can be shared neither between threads nor across a fork (parent and child would move the
    same file offset), so every thread of every process starts empty. Pickling carries no values.
    """

    def __init__(
        self, load: Callable[[Key], Value], *, capacity: float, cost: Callable[[Value], float] | None = None
    ) -> None:
        self.load, self.capacity, self.cost = load, capacity, cost
        self._local = threading.local()

    def __call__(self, key: Key) -> Value:
        values = self._values()
        if key in values:
            values.move_to_end(key)
            return values[key]
        value = values[key] = self.load(key)
        total: float = sum(1 if self.cost is None else self.cost(held) for held in values.values())
        while total > self.capacity and len(values) > 1:
            _, dropped = values.popitem(last=False)
            total -= 1 if self.cost is None else self.cost(dropped)
        return value

    def _values(self) -> OrderedDict[Key, Value]:
        if getattr(self._local, "process", None) != os.getpid():
            self._local.process = os.getpid()
            self._local.values = OrderedDict()
        return self._local.values

    def __getstate__(self) -> dict[str, Any]:
        return {"load": self.load, "capacity": self.capacity, "cost": self.cost}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()
