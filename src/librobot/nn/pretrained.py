"""Whether constructors may fetch published weights: not while a checkpoint is about to replace them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_skip: ContextVar[bool] = ContextVar("skip_pretrained", default=False)


@contextmanager
def skip_pretrained() -> Iterator[None]:
    """Build modules without their published weights, for a state dict that follows."""
    token = _skip.set(True)
    try:
        yield
    finally:
        _skip.reset(token)


def wants_pretrained(option: bool | str) -> bool:
    """Whether to load what a `pretrained` option names, here and now."""
    return bool(option) and not _skip.get()
