"""Losses as pure functions: tensors and masks in, one loss per sample out.

An element that `mask` hides contributes nothing, whatever its value (even NaN) and whatever its gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from librobot import replicas

Mask = Bool[Tensor, "b k"] | Bool[Tensor, "b k a"]


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
    if reduction == "original":
        return weighted / len(loss)
    total = replicas.mean(share.sum())  # of the whole batch, wherever its samples are
    return weighted / torch.clamp_min(total, 1.0 / mask.shape[1])
