"""Live memory and floating-point operations of what runs, operation by operation, on fake tensors or real."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """Two matrix products, of queries with keys and of weights with values."""
    return 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> int:
    """The weights again, and four products for three gradients: two and a half times the forward pass."""
    return 5 * attention(query, key, value) // 2


FLOPS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


class Ledger(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make while it is active, until they are freed.

    `live` are those of now, `peak` the most since `reset_peak`, `flops` the operations since the beginning:
    multiplications and additions of matrix products, convolutions and attention. What activation
    checkpointing computes a second time is in `recomputed`, not in `flops`. With `memory` False only the
    operations are counted.
    """

    supports_higher_order_operators = True  # what is inside of them is not seen

    def __init__(self, memory: bool = True) -> None:
        super().__init__()
        self.memory = memory
        self.live = self.peak = 0
        self.flops = self.recomputed = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = FLOPS.get(getattr(func, "_overloadpacket", None))
        if count is not None:
            number = int(count(*args, **kwargs, out_val=out))
            # A backward pass records nothing, unless it runs a part of the forward pass again.
            if torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled():
                self.recomputed += number
            else:
                self.flops += number
        if self.memory:
            self.add(x for x in tree_leaves(out) if isinstance(x, Tensor))
        return out

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are there already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes()
            if key in self._known:
                continue
            self._known[key] = weakref.ref(storage, partial(self._freed, key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def reset_peak(self) -> None:
        self.peak = self.live

    def _freed(self, key: int, size: int, _: object) -> None:
        del self._known[key]
        self.live -= size


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each counted once."""
    return sum({id(s): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
