"""Parallel decoding with an MLP for the output (Kim et al. 2025, OpenVLA-OFT, section IV).

There is a slot for each dimension of each action, which starts as zeros and its position. Slots read each
other and the context, all at once. The slots of an action, side by side, pass a residual MLP.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from librobot.networks.base import ContextTokens, Network, Sizes
from librobot.networks.inputs import ContextTokenProjection, TimeMLP, check_horizon, project
from librobot.nn.cross_attention import CrossAttentionBlock


class ResidualMLP(nn.Sequential):
    """Norm, linear, ReLU; `num_blocks` of the same as residual branches; norm, linear."""

    def __init__(self, width_in: int, width_out: int, *, width: int, num_blocks: int) -> None:
        super().__init__(
            _norm_linear_relu(width_in, width),
            *(_ResidualBranch(width) for _ in range(num_blocks)),
            nn.LayerNorm(width),
            nn.Linear(width, width_out),
        )


class _ResidualBranch(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = _norm_linear_relu(width, width)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return x + self.branch(x)


def _norm_linear_relu(width_in: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width_in), nn.Linear(width_in, width_out), nn.ReLU())


class OFT(Network):
    """`num_layers` transformer layers over the slots, then the MLP with `num_blocks` residual branches of
    `head_width` (2 in the paper's code, whose slots pass all layers of the backbone itself).

    With noise, the projected noisy number and the time are added to each slot.
    """

    kind: ClassVar[Literal["denoiser"]] = "denoiser"

    def __init__(
        self,
        *,
        sizes: Sizes,
        width: int = 256,
        num_layers: int = 4,
        num_heads: int = 8,
        mlp_width: int = 1024,
        num_blocks: int = 2,
        head_width: int = 1024,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, found {num_layers}; slots must see the context")
        self.horizon, self.action_dim = sizes.horizon, sizes.action_dim
        self.positions = nn.Parameter(0.02 * torch.randn(sizes.horizon, sizes.action_dim, width))
        self.time_mlp = self.value_proj = None
        if sizes.takes_noise:
            self.time_mlp = TimeMLP(width)
            self.value_proj = nn.Linear(1, width)
        self.context_proj = ContextTokenProjection(sizes, width)
        self.layers = nn.ModuleList(
            CrossAttentionBlock(width, num_heads, mlp_width) for _ in range(num_layers)
        )
        self.output_mlp = ResidualMLP(
            sizes.action_dim * width, sizes.output_width, width=head_width, num_blocks=num_blocks
        )

    def forward(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], context: ContextTokens
    ) -> Float[Tensor, "b k o"]:
        check_horizon(x_t, self.horizon)
        slots = repeat(self.positions, "k a d -> b k a d", b=len(x_t))
        if self.time_mlp is not None and self.value_proj is not None:
            slots = slots + project(self.value_proj, x_t[..., None]) + self.time_mlp(time)[:, None, None]
        x = rearrange(slots, "b k a d -> b (k a) d")
        tokens = self.context_proj(context)
        mask = torch.cat((context.mask, context.mask.new_ones(x.shape[:2])), dim=1)[:, None]
        for layer in self.layers:
            x = layer(x, torch.cat((tokens, x), dim=1), mask=mask)
        return self.output_mlp(rearrange(x, "b (k a) d -> b k (a d)", a=self.action_dim))
