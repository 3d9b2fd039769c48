"""Norms that torch does not have."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class GemmaRMSNorm(nn.Module):
    """RMSNorm as Gemma writes it: the scale is stored as its difference from one, and starts at zero."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        normed = nn.functional.rms_norm(x.float(), (x.shape[-1],), eps=self.eps)
        return (normed * (1.0 + self.scale.float())).to(x.dtype)
