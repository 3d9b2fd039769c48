"""Policies without weights: their parameters are fake tensors, which have a shape, a dtype and no memory.

What an operation makes of a fake tensor is fake too; small ones (masks, tokens, positions, statistics) stay
real, so that code which looks at them runs as it always does. That is why no tensor mode is active here:
contagion does the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
FACTORIES = {
    aten.empty.memory_format,
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.rand.default,
    aten.randn.default,
    aten.empty_strided.default,
}
BY_MASK = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
SMALL = 16_384
"""Tensors of fewer numbers stay real."""


class Weightless(TorchDispatchMode):
    """While it is active, large tensors of floats come without memory, and so does what is made of them.

    `fakes` is where they belong to; tensors of one may not meet those of another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES and is_large(args[0], kwargs.get("dtype")):
            with self.fakes:
                return func(*args, **kwargs)
        if func is aten.nonzero.default and isinstance(args[0], FakeTensor):
            return everywhere(args[0]).nonzero()
        if func in BY_MASK and any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            args = (args[0], places(args[1]), *args[2:])
        return func(*args, **kwargs)

    def without_memory(self, tensor: Tensor) -> Tensor:
        """A fake tensor like `tensor`."""
        return tensor if isinstance(tensor, FakeTensor) else self.fakes.from_tensor(tensor.detach())

    def strip(self, module: nn.Module) -> None:
        """Take the memory of the parameters that still have any. Shared ones stay shared."""
        made: dict[int, nn.Parameter] = {}
        for child in module.modules():
            for name, parameter in child._parameters.items():
                if parameter is None or isinstance(parameter, FakeTensor):
                    continue
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(
                        self.without_memory(parameter), requires_grad=parameter.requires_grad
                    )
                child._parameters[name] = made[id(parameter)]


def is_large(size: Any, dtype: torch.dtype | None) -> bool:
    floats = (dtype or torch.get_default_dtype()).is_floating_point
    return floats and math.prod(int(n) for n in size) >= SMALL


def places(indices: Any) -> list[Tensor | None]:
    """Masks as the places where they are True: how many there are decides about a shape."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype is torch.bool:
            mask = everywhere(index) if isinstance(index, FakeTensor) else index
            found += list(mask.nonzero(as_tuple=True))
        else:
            found.append(index)
    return found


def everywhere(mask: Tensor) -> Tensor:
    """In the place of a mask that nobody knows: nothing is left out."""
    return torch.ones(mask.shape, dtype=torch.bool)


@contextmanager
def weightless() -> Iterator[Weightless]:
    """Build a policy in here, then `strip` it."""
    with Weightless() as mode:
        yield mode
