"""Sequences of tokens as one vector."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


def mean_of_real(values: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b d"]:
    """The mean of each sample's real tokens (zeros where there is none)."""
    kept = values.masked_fill(~mask.unsqueeze(-1), 0.0).sum(dim=1)
    return kept / mask.sum(dim=1, keepdim=True).clamp_min(1)


def situation(
    hidden: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"], state: Float[Tensor, "b t s"]
) -> Float[Tensor, "b f"]:
    """Numbers that tell one observation from another, without a gradient: the normalised state, and the mean
    of the backbone's tokens at unit scale. Optimal-transport coupling compares them."""
    pooled = functional.layer_norm(mean_of_real(hidden.detach().float(), mask), hidden.shape[-1:])
    return torch.cat((state.detach().float().flatten(1), pooled), dim=-1)
