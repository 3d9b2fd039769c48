"""How constructors come by published weights: they read them, leave them in their files until the process
knows its part, or do without, because others' are about to replace theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from unittest import mock

from torch import nn

from librobot.nn.stored import StoredTensor

_stored: ContextVar[Mapping[str, str] | None] = ContextVar("stored_files", default=None)
_unread: ContextVar[bool] = ContextVar("unread", default=False)
_bare: ContextVar[bool] = ContextVar("bare", default=False)


@contextmanager
def skip_pretrained(files: Mapping[str, str] | None = None) -> Iterator[None]:
    """Build modules without their published weights, for a state dict that follows.

    `files` (name -> text) are the configuration and the tokenizer that the checkpoint holds of its backbone.
    Inside of `weightless` too they have memory, for that state dict to fill.
    """
    token, left, bare = _stored.set(dict(files or {})), _unread.set(False), _bare.set(False)
    try:
        yield
    finally:
        _bare.reset(bare)
        _unread.reset(left)
        _stored.reset(token)


def weights_follow() -> bool:
    """Whether what is built here gets all of its weights from a state dict of this process."""
    return _stored.get() is not None and not _bare.get()


def wants_pretrained(option: bool | str) -> bool:
    """Whether to load what a `pretrained` option names, here and now."""
    return bool(option) and _stored.get() is None


def stored_files() -> Mapping[str, str]:
    """The backbone's files of the checkpoint that is being read, {} where none is."""
    return _stored.get() or {}


@contextmanager
def unread_weights() -> Iterator[None]:
    """Leave published weights in their files, as `StoredTensor`s, where these are safetensors."""
    token = _unread.set(True)
    try:
        yield
    finally:
        _unread.reset(token)


def stays_unread() -> bool:
    """Whether published weights are wanted as `StoredTensor`s, here and now."""
    return _unread.get()


@contextmanager
def weightless() -> Iterator[None]:
    """Build modules whose parameters have shapes and no memory (torch's meta device), and no published
    weights but unread ones (`unread_weights`, inside of this); buffers are real. For processes that get their
    weights from another one."""
    register = nn.Module.register_parameter

    def forget(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if _bare.get() and param is not None and not param.is_meta and not isinstance(param, StoredTensor):
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    with skip_pretrained(), mock.patch.object(nn.Module, "register_parameter", forget):
        token = _bare.set(True)
        try:
            yield
        finally:
            _bare.reset(token)
