"""Deterministic heads: the denoiser is called once, with zeros and time 0, and its output is the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from librobot import losses
from librobot.heads.base import ActionHead, Denoiser, Mask


class Regression(ActionHead):
    """Base of both: predicts, and compares. `noise`, `time` and `num_steps` have nothing to act on."""

    generative: ClassVar[bool] = False

    def __init__(self, *, dim_weights: Sequence[float] | None = None) -> None:
        super().__init__(dim_weights=dim_weights)

    def compare(
        self, prediction: Float[Tensor, "b k a"], target: Float[Tensor, "b k a"], mask: Mask
    ) -> Float[Tensor, " b"]:
        raise NotImplementedError

    def loss(
        self,
        denoiser: Denoiser,
        context: Any,
        actions: Float[Tensor, "b k a"],
        mask: Mask,
        *,
        noise: Float[Tensor, "b k a"] | None = None,
        time: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, " b"]:
        zeros = torch.zeros_like(actions)
        return self.compare(denoiser(zeros, zeros[:, 0, 0], context), actions, mask)

    def sample(
        self,
        denoiser: Denoiser,
        context: Any,
        shape: tuple[int, int, int],
        *,
        noise: Float[Tensor, "*steps b k a"] | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
    ) -> Float[Tensor, "b k a"]:
        self.no_guidance(guidance)
        zeros = self.anchor.new_zeros(shape)
        return denoiser(zeros, zeros[:, 0, 0], context)


class L1(Regression):
    """Mean absolute error: ACT (Zhao et al. 2023), OpenVLA-OFT (Kim et al. 2025)."""

    def compare(
        self, prediction: Float[Tensor, "b k a"], target: Float[Tensor, "b k a"], mask: Mask
    ) -> Float[Tensor, " b"]:
        return losses.l1(prediction, target, mask, self.dim_weights)


class MSE(Regression):
    """Mean squared error: predicts the mean of the demonstrated actions."""

    def compare(
        self, prediction: Float[Tensor, "b k a"], target: Float[Tensor, "b k a"], mask: Mask
    ) -> Float[Tensor, " b"]:
        return losses.mse(prediction, target, mask, self.dim_weights)
