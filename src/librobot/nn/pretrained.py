"""Whether constructors may fetch published weights: not while a checkpoint is about to replace them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

_stored: ContextVar[Mapping[str, str] | None] = ContextVar("stored_files", default=None)


@contextmanager
def skip_pretrained(files: Mapping[str, str] | None = None) -> Iterator[None]:
    """Build modules without their published weights, for a state dict that follows.

    `files` (name -> text) are the configuration and the tokenizer that the checkpoint holds of its backbone.
    """
    token = _stored.set(dict(files or {}))
    try:
        yield
    finally:
        _stored.reset(token)


def wants_pretrained(option: bool | str) -> bool:
    """Whether to load what a `pretrained` option names, here and now."""
    return bool(option) and _stored.get() is None


def stored_files() -> Mapping[str, str]:
    """The backbone's files of the checkpoint that is being read, {} where none is."""
    return _stored.get() or {}
