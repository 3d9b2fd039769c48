"""How the state's tokens and the backbone's become one context (`fusion=`).

A fusion is built as `Fusion(width=, ...)` and called with the backbone's tokens (b, l, d), their mask (True
on real ones) and the state's tokens (b, n, d), which are all real. It returns the context and its mask.
Hidden tokens never reach others. Without state tokens (n = 0) every fusion returns the backbone's alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from librobot.nn.cross_attention import CrossAttentionBlock

Fused = tuple[Float[Tensor, "b m d"], Bool[Tensor, "b m"]]


class Fusion(nn.Module):
    """Base of all."""

    def forward(
        self,
        vision: Float[Tensor, "b l d"],
        vision_mask: Bool[Tensor, "b l"],
        state: Float[Tensor, "b n d"],
    ) -> Fused:
        if not state.shape[1]:
            return vision, vision_mask
        return self.fuse(vision, vision_mask, state)

    def fuse(
        self,
        vision: Float[Tensor, "b l d"],
        vision_mask: Bool[Tensor, "b l"],
        state: Float[Tensor, "b n d"],
    ) -> Fused:
        """The same for n of at least 1."""
        raise NotImplementedError


class Concatenate(Fusion):
    """State tokens, then the backbone's (m = n + l): whatever reads the context mixes them."""

    def __init__(self, *, width: int) -> None:
        super().__init__()

    def fuse(
        self,
        vision: Float[Tensor, "b l d"],
        vision_mask: Bool[Tensor, "b l"],
        state: Float[Tensor, "b n d"],
    ) -> Fused:
        return _prepend(state, vision, vision_mask)


class CrossAttentionFusion(Fusion):
    """State tokens that have read the backbone's by `num_layers` blocks of cross-attention, then the
    backbone's own, unchanged (m = n + l): what matters to the body in brief, beside all the detail."""

    def __init__(self, *, width: int, num_layers: int = 1, num_heads: int = 8, mlp_width: int = 1024) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            CrossAttentionBlock(width, num_heads, mlp_width) for _ in range(num_layers)
        )

    def fuse(
        self,
        vision: Float[Tensor, "b l d"],
        vision_mask: Bool[Tensor, "b l"],
        state: Float[Tensor, "b n d"],
    ) -> Fused:
        for layer in self.layers:
            state = layer(state, vision, mask=vision_mask[:, None])
        return _prepend(state, vision, vision_mask)


class FiLM(Fusion):
    """(1 + scale) * vision + shift, both linear in the mean of the state's tokens (Perez et al. 2018, section
    2; m = l). Starts as the identity: the state is not felt until training has moved the linear map."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.film = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def fuse(
        self,
        vision: Float[Tensor, "b l d"],
        vision_mask: Bool[Tensor, "b l"],
        state: Float[Tensor, "b n d"],
    ) -> Fused:
        scale, shift = self.film(state.mean(dim=1, keepdim=True)).chunk(2, dim=-1)
        return (1 + scale) * vision + shift, vision_mask


class Gated(Fusion):
    """The backbone's tokens, which read the state's through `num_layers` gated cross-attention blocks
    (Flamingo, Alayrac et al. 2022, section 2.2; m = l). The gates start shut: a pretrained backbone's
    features are first passed on as they are."""

    def __init__(self, *, width: int, num_layers: int = 1, num_heads: int = 8, mlp_width: int = 1024) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            CrossAttentionBlock(width, num_heads, mlp_width, gated=True) for _ in range(num_layers)
        )

    def fuse(
        self,
        vision: Float[Tensor, "b l d"],
        vision_mask: Bool[Tensor, "b l"],
        state: Float[Tensor, "b n d"],
    ) -> Fused:
        for layer in self.layers:
            vision = layer(vision, state)
        return vision, vision_mask


def _prepend(
    state: Float[Tensor, "b n d"], vision: Float[Tensor, "b l d"], vision_mask: Bool[Tensor, "b l"]
) -> Fused:
    real = vision_mask.new_ones(state.shape[:2])
    return torch.cat((state, vision), dim=1), torch.cat((real, vision_mask), dim=1)
