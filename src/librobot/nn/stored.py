"""Tensors that are still in a file. A process that keeps a part of the published weights reads that part
alone, and never has the whole of them in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from librobot.errors import LibrobotError

Part = tuple[slice, ...] | None  # None: all of it
Reader = Callable[[Part], Tensor]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CASTS = {"detach", "float", "double", "half", "bfloat16", "contiguous", "alias"}
"""After these a part of the result comes from the same part of the tensor."""
MOVES = {
    "__getitem__", "cat", "chunk", "concat", "flatten", "movedim", "narrow", "permute", "reshape", "select",
    "split", "squeeze", "stack", "swapaxes", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view",
    "T", "mT",
}  # fmt: skip
"""These only move numbers. They too wait until their result is read, and then take all of the tensor."""
ABOUT = {
    "__hash__", "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous",
    "is_floating_point", "ndimension", "nelement", "numel", "size", "storage_offset", "stride",
    "untyped_storage", "requires_grad_",
}  # fmt: skip
"""What the numbers do not matter to."""


class StoredTensor(Tensor):
    """A tensor with a shape and a dtype, whose numbers stay in a file until `read`.

    Casts, and what only moves numbers, stay unread too; any other operation reads all of the tensor, and
    forgets it afterwards. Raises LibrobotError where something would change it in place.
    """

    reader: Reader

    @staticmethod
    def made(like: Tensor, reader: Reader) -> StoredTensor:
        """One with the shape and dtype of `like`; `reader` gives its parts."""
        with torch._C.DisableTorchFunctionSubclass():
            empty = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
            tensor = Tensor._make_subclass(StoredTensor, empty)
        tensor.reader = reader
        return tensor

    def read(self, part: Part = None) -> Tensor:
        """The numbers, of all of it or of a part, on the CPU."""
        with torch.no_grad():
            return self.reader(part).to(self.dtype)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where its numbers come to, and where what is made beside it belongs."""
        return torch.device("cpu")

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), func.__name__
        with torch._C.DisableTorchFunctionSubclass():
            if name in ("__get__", "__set__", "__delete__"):
                return attribute(func, name, args)
            if name in ABOUT:
                return func(*args, **kwargs)
            if name == "to":
                return sent(args[0], args[1:], kwargs)
            if all(isinstance(x, StoredTensor) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)):
                if name in CASTS or (name == "__getitem__" and args[1] is Ellipsis):
                    return StoredTensor.made(func(*args, **kwargs), args[0].read)
                if name in MOVES:
                    return moved(func, args, kwargs)
            if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
                refuse(name)
            args, kwargs = tree_map(lambda x: x.read() if isinstance(x, StoredTensor) else x, (args, kwargs))
            return func(*args, **kwargs)


def attribute(func: Any, name: str, args: tuple[Any, ...]) -> Any:
    """`x.NAME`, and `x.NAME = ...` where that does not change the numbers."""
    which, x = func.__self__.__name__, args[0]
    if name == "__get__" and which == "data":
        return StoredTensor.made(x, x.read)
    if name == "__get__" and which in MOVES:
        return moved(func, args, {})
    if name == "__get__" or which in ("requires_grad", "grad"):
        return func(*args)
    return refuse(which)


def refuse(name: str) -> None:
    raise LibrobotError(
        f"{name}: published weights of which each process reads its part cannot be changed while a policy is "
        f"built; take trainer=ddp"
    )


def sent(x: StoredTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`x.to(...)`: another dtype waits, another device does not."""
    if args and isinstance(args[0], Tensor):
        device, dtype = args[0].device, args[0].dtype
    else:
        device, dtype = torch._C._nn._parse_to(*args, **kwargs)[:2]
    empty = torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device="meta")
    if device is None or device.type == "cpu":
        return StoredTensor.made(empty, x.read)
    return empty if device.type == "meta" else x.read().to(device, empty.dtype)


def moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation that only moves numbers makes of unread tensors: unread tensors."""

    def reader(which: int | None, part: Part) -> Tensor:
        read = tree_map(lambda x: x.read() if isinstance(x, StoredTensor) else x, (args, kwargs))
        out = func(*read[0], **read[1])
        out = out if which is None else out[which]
        return out if part is None else out[part]

    shapes = func(*args, **kwargs)
    if isinstance(shapes, Tensor):
        return StoredTensor.made(shapes, partial(reader, None))
    return type(shapes)(StoredTensor.made(x, partial(reader, i)) for i, x in enumerate(shapes))


def stored_tensors(paths: Iterable[str]) -> dict[str, StoredTensor]:
    """The tensors of safetensors files, by name, unread."""
    found = {}
    for path in paths:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                about = file.get_slice(name)
                like = torch.empty(about.get_shape(), dtype=DTYPES[about.get_dtype()], device="meta")
                found[name] = StoredTensor.made(like, partial(read_part, path, name))
    return found


def opened(path: str) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise LibrobotError(
            f"{path}: expected a safetensors file that can be read, found: {error}"
        ) from error


def read_part(path: str, name: str, part: Part) -> Tensor:
    """A part of one tensor of a file. The file is closed again, and its pages with it."""
    try:
        with opened(path) as file:
            if not part:
                return file.get_tensor(name).clone()
            return file.get_slice(name)[part].clone()
    except (OSError, SafetensorError) as error:
        raise LibrobotError(f"{path}: {name} cannot be read: {error}") from error
