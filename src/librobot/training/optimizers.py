"""Optimisers as the `optim=` group makes them: called with parameter groups, and nothing else.

Any `torch.optim` class works there with `_partial_: true`; these exist where a default needs a decision.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch.optim import SGD, AdamW
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from librobot.errors import require
from librobot.frameworks.sharding import alike


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

    `fused` None takes torch's fused kernel, one launch for all tensors, where the device has it; it changes
    rounding, not the method.
    """
    groups = listed(params)
    made = MixedAdamW if len(list(alike([p for g in groups for p in g["params"]]))) > 1 else AdamW
    return made(
        groups,
        lr=lr,
        betas=(betas[0], betas[1]),
        eps=eps,
        weight_decay=weight_decay,
        fused=has_fused(groups) if fused is None else fused,
    )


class MixedAdamW(AdamW):
    """AdamW for parameters of which some are spread over processes and some are not, or otherwise: kernels
    over many tensors take only tensors that are spread alike."""

    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        self.param_groups = [g | {"params": part} for g in groups for part in alike(g["params"])]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


def adamw_8bit(
    params: Iterable[dict[str, Any]],
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    min_8bit_size: int = 4096,
) -> torch.optim.Optimizer:
    """AdamW whose moments are kept in eight bits, in blocks with a scale each (Dettmers et al. 2022).

    Tensors of fewer than `min_8bit_size` numbers keep theirs in 32 bits.
    """
    bitsandbytes = require("bitsandbytes", "bnb")
    return bitsandbytes.optim.AdamW8bit(
        listed(params),
        lr=lr,
        betas=(betas[0], betas[1]),
        eps=eps,
        weight_decay=weight_decay,
        min_8bit_size=min_8bit_size,
    )


def paged_adamw(
    params: Iterable[dict[str, Any]],
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    bits: Literal[8, 32] = 32,
) -> torch.optim.Optimizer:
    """AdamW with its state in pages that move between a GPU and the host (Dettmers et al. 2023, section 3).

    `bits` are those of the state. Parameters on a CPU get `adamw`, with a warning: there is nothing to page.
    """
    bitsandbytes = require("bitsandbytes", "bnb")
    if bits not in (8, 32):
        raise ValueError(f"bits must be 8 or 32, found {bits}")
    groups = listed(params)
    if any(parameter.device.type == "cpu" for group in groups for parameter in group["params"]):
        warnings.warn(
            "optim=paged_adamw pages a GPU's memory; on a CPU optim=adamw takes its place", stacklevel=2
        )
        return adamw(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    made = bitsandbytes.optim.PagedAdamW8bit if bits == 8 else bitsandbytes.optim.PagedAdamW32bit
    return made(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay)


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


def listed(params: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups that can be gone through more than once."""
    return [group | {"params": list(group["params"])} for group in params]


def has_fused(groups: Iterable[dict[str, Any]]) -> bool:
    """Whether torch's fused kernels exist for all the parameters."""
    supported = _get_fused_kernels_supported_devices()
    return all(p.is_floating_point() and p.device.type in supported for g in groups for p in g["params"])
