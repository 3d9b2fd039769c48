"""Arrays that a data worker fills where the training process will read them, so that no batch is copied."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import get_worker_info


def empty(shape: Sequence[int]) -> UInt8[np.ndarray, " ..."]:
    """An uninitialised uint8 array; in a data worker it lies in memory shared with the training process, as
    torch's own collate has it."""
    if get_worker_info() is None:
        return np.empty(shape, np.uint8)
    storage = torch.UntypedStorage._new_shared(int(np.prod(shape)))
    flat = torch.tensor([], dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
    return flat.view(*shape).numpy()


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor over the memory of `array`: the very one that `empty` made it from, if there is one."""
    base = array.base
    if isinstance(base, Tensor) and base.shape == array.shape and base.data_ptr() == array.ctypes.data:
        return base
    return torch.from_numpy(array)
