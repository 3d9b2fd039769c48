"""Optimisers as the `optim=` group makes them: called with parameter groups, and nothing else.

Any `torch.optim` class works there with `_partial_: true`; these exist where a default needs a decision.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import SGD, AdamW


def adamw(
    params: Iterable[dict[str, Any]],
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    fused: bool | None = None,
) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019).

    `fused` None takes torch's fused kernel, one launch for all tensors; it changes rounding, not the method.
    """
    return AdamW(
        params,
        lr=lr,
        betas=(betas[0], betas[1]),
        eps=eps,
        weight_decay=weight_decay,
        fused=True if fused is None else fused,
    )


def sgd(
    params: Iterable[dict[str, Any]],
    *,
    lr: float = 1e-2,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum."""
    return SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)
