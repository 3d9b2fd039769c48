"""A batch's way from a data worker: pictures lie where the training process reads them, the rest is small.

The memory of pictures goes back to the worker when the training process has dropped the batch, and is filled
again: fresh memory costs a page fault for every 4 KiB, several times what writing the pictures into it does.
The training process opens it by the worker's entry in /proc, a fraction of the work of handing over a file
descriptor, which is what torch does for every tensor, the smallest too.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import get_worker_info

HEADER = mmap.PAGESIZE
"""Bytes before the pictures; the first tells whether the segment is in use."""
FREE, IN_USE = 0, 1
COPIED = 256 * 2**10
"""Bytes up to which a tensor is sent with the message itself."""


class _Segment:
    """Memory without a name, which lives as long as a process has it mapped."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.handle = os.memfd_create("librobot-pictures")
        os.ftruncate(self.handle, HEADER + size)
        self.memory = mmap.mmap(self.handle, HEADER + size)


class _Loan:
    """One use of a segment as `array`, from its filling until the training process drops what it received."""

    def __init__(self, segment: _Segment, array: np.ndarray) -> None:
        self.segment, self.array, self.sent = segment, weakref.ref(array), False
        segment.memory[0] = IN_USE
        weakref.finalize(array, self.end).atexit = False

    def end(self) -> None:
        if not self.sent:
            self.segment.memory[0] = FREE


class _Copied:
    """What goes through the queue in place of a small tensor, and arrives as one."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        return torch.from_numpy, (self.array,)


class _Sent:
    """What goes through the queue in place of pictures, and arrives as a tensor over the same memory."""

    def __init__(self, loan: _Loan, array: np.ndarray, shape: Sequence[int]) -> None:
        self.loan, self.array, self.shape = loan, array, tuple(shape)

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        self.loan.sent = True
        handle = self.loan.segment.handle
        path = f"/proc/{os.getpid()}/fd/{handle}"
        return _receive, (path if others_may_open(path) else DupFd(handle), self.shape)


def others_may_open(path: str) -> bool:
    """Whether another process of this user may open an entry of /proc: not where there is none, nor where the
    kernel gave it to another user, as it does of processes that must not be looked into (proc(5))."""
    try:
        return os.lstat(path).st_uid == os.geteuid()
    except FileNotFoundError:
        return False


class _Pool:
    """The segments of this process, and the loan at each address of pictures."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.segments: list[_Segment] = []
        self.loans: dict[int, _Loan] = {}

    def lend(self, shape: Sequence[int]) -> np.ndarray:
        size = int(np.prod(shape))
        free = [s for s in self.segments if s.size >= size and s.memory[0] == FREE]
        segment = min(free, key=lambda s: s.size, default=None)
        if segment is None:
            segment = _Segment(size)
            self.segments.append(segment)
        array = _pictures(segment.memory, shape)
        self.loans[array.ctypes.data] = _Loan(segment, array)
        return array


_pool: _Pool | None = None


def empty(shape: Sequence[int]) -> UInt8[np.ndarray, " ..."]:
    """An uninitialised uint8 array; in a data worker it lies in memory that `sent` shares with the training
    process."""
    global _pool
    if get_worker_info() is None or not hasattr(os, "memfd_create") or not np.prod(shape):
        return np.empty(shape, np.uint8)
    if _pool is None or _pool.process != os.getpid():
        _pool = _Pool()
    return _pool.lend(shape)


def sent(value: Any) -> Any:
    """`value`, a tree of dataclasses, dictionaries and tensors, in the form in which a worker returns it:
    arrays of `empty` are not copied on their way."""
    if get_worker_info() is None:
        return value
    if isinstance(value, Tensor):
        return _sent(value)
    if isinstance(value, dict):
        return {key: sent(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: sent(getattr(value, f.name)) for f in fields(value)})
    return value


def _sent(tensor: Tensor) -> Any:
    loan = _pool.loans.get(tensor.data_ptr()) if _pool is not None else None
    array = loan.array() if loan is not None else None
    whole = array is not None and tensor.dtype == torch.uint8 and tensor.numel() == array.size
    if loan is not None and array is not None and whole and not loan.sent and tensor.is_contiguous():
        return _Sent(loan, array, tensor.shape)
    if tensor.device.type != "cpu" or tensor.dtype == torch.bfloat16 or tensor.nbytes > COPIED:
        return tensor
    return _Copied(tensor.numpy())


def _pictures(memory: mmap.mmap, shape: Sequence[int]) -> np.ndarray:
    return np.frombuffer(memory, np.uint8, int(np.prod(shape)), HEADER).reshape(shape)


def _receive(handle: Any, shape: Sequence[int]) -> Tensor:
    """The pictures as a tensor; the worker may fill their memory again when its storage is gone. Raises
    ConnectionError where the worker is gone."""
    try:
        descriptor = os.open(handle, os.O_RDWR) if isinstance(handle, str) else handle.detach()
    except FileNotFoundError as error:
        raise ConnectionError(str(error)) from error
    memory = mmap.mmap(descriptor, 0)
    os.close(descriptor)
    array = _pictures(memory, shape)
    weakref.finalize(array, memory.__setitem__, 0, FREE).atexit = False
    return torch.from_numpy(array)
