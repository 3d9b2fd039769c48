"""Losses as pure functions: tensors and masks in, one loss per sample out.

An element that `mask` hides contributes nothing, whatever its value (even NaN) and whatever its gradient.

What a loss is made of can be seen from outside while it is computed (`recorded`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from librobot import replicas

Mask = Bool[Tensor, "b k"] | Bool[Tensor, "b k a"]


@dataclass
class Record:
    """What the losses of a batch were made of, without gradients and in float32.

    `elements` are the error of each number (b, k, a), 0 where it does not count, and which of them count:
    one pair for every comparison of chunks. `samples` are each sample's part of a sum (b,), and of what that
    is divided by (b,): one pair for every `reduce`.
    """

    elements: list[tuple[Float[Tensor, "b k a"], Bool[Tensor, "b k a"]]] = field(default_factory=list)
    samples: list[tuple[Float[Tensor, " b"], Float[Tensor, " b"]]] = field(default_factory=list)


_record: ContextVar[Record | None] = ContextVar("record", default=None)


@contextmanager
def recorded(into: Record | None) -> Iterator[None]:
    """The losses that are computed in here are noted in `into`; with None nobody's note takes them."""
    token = _record.set(into)
    try:
        yield
    finally:
        _record.reset(token)


def note(error: Float[Tensor, "b k a"], mask: Bool[Tensor, "b k a"]) -> None:
    """For a head that compares chunks number by number without `l1`, `mse` or `masked_mean`, which do this
    themselves: `error` is what it makes the mean of, weights aside."""
    record = _record.get()
    if record is not None:
        record.elements.append((error.detach().float().masked_fill(~mask, 0.0), mask))


def masked_mean(
    error: Float[Tensor, "b k a"], mask: Mask, weights: Float[Tensor, " a"] | None = None
) -> Float[Tensor, " b"]:
    """The mean of each sample's admitted elements, in float32; 0 for a sample with none.

    `weights` (positive, one for each dimension) makes it a weighted mean.
    """
    if mask.ndim == 2:
        mask = mask.unsqueeze(-1)
    mask = mask.expand_as(error)
    kept = error.float().masked_fill(~mask, 0.0)
    note(kept, mask)
    if weights is None:
        return kept.sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp_min(1)
    weights = weights.float()
    total = (weights * mask).sum(dim=(1, 2))
    return (weights * kept).sum(dim=(1, 2)) / torch.where(total > 0, total, 1.0)


def _difference(
    prediction: Float[Tensor, "b k a"], target: Float[Tensor, "b k a"], mask: Mask
) -> Float[Tensor, "b k a"]:
    """`prediction - target` in float32, zero where masked: a NaN there must not reach the gradient."""
    hidden = ~(mask.unsqueeze(-1) if mask.ndim == 2 else mask)
    return (prediction.float() - target.float()).masked_fill(hidden, 0.0)


def l1(
    prediction: Float[Tensor, "b k a"],
    target: Float[Tensor, "b k a"],
    mask: Mask,
    weights: Float[Tensor, " a"] | None = None,
) -> Float[Tensor, " b"]:
    """Mean absolute error of each sample."""
    return masked_mean(_difference(prediction, target, mask).abs(), mask, weights)


def mse(
    prediction: Float[Tensor, "b k a"],
    target: Float[Tensor, "b k a"],
    mask: Mask,
    weights: Float[Tensor, " a"] | None = None,
) -> Float[Tensor, " b"]:
    """Mean squared error of each sample."""
    return masked_mean(_difference(prediction, target, mask).square(), mask, weights)


def gaussian_kl(mean: Float[Tensor, "b z"], log_variance: Float[Tensor, "b z"]) -> Float[Tensor, " b"]:
    """KL(N(mean, variance) || N(0, 1)), summed over the latent (Kingma and Welling 2014, appendix B)."""
    mean, log_variance = mean.float(), log_variance.float()
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(-1)


def reduce(
    loss: Float[Tensor, " b"],
    mask: Bool[Tensor, "b k"],
    reduction: Literal["masked", "original"] = "masked",
) -> Float[Tensor, ""]:
    """One number from per-sample means over real steps.

    `masked` weights every real step alike, whichever sample it is in. `original` divides by all steps,
    padding included, as the published ACT code does: samples near an episode's end then count for less.
    """
    share = mask.float().mean(dim=1)
    weighted = (loss * share).sum()
    record = _record.get()
    if record is not None:
        divisor = torch.ones_like(share) if reduction == "original" else share
        record.samples.append(((loss * share).detach().float(), divisor))
    if reduction == "original":
        return weighted / len(loss)
    total = replicas.mean(share.sum())  # of the whole batch, wherever its samples are
    return weighted / torch.clamp_min(total, 1.0 / mask.shape[1])
