"""The smallest denoiser: a residual MLP over the whole chunk, as in Octo's diffusion head (Octo Model Team
2024, after IDQL's, Hansen-Estruch et al. 2023)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from librobot.networks.base import ContextTokens, Network, Sizes
from librobot.networks.inputs import ContextPool, TimeMLP, check_horizon


class ResidualBlock(nn.Module):
    """x + linear(silu(linear(norm(dropout(x))))), four times as wide inside."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Dropout(dropout),
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.SiLU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        return x + self.branch(x)


class MLPDenoiser(Network):
    """Flattened chunk, time and the mean of the context's tokens, side by side; then `num_blocks` blocks."""

    kind: ClassVar[Literal["denoiser"]] = "denoiser"

    def __init__(self, *, sizes: Sizes, width: int = 256, num_blocks: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.horizon = sizes.horizon
        self.context_pool = ContextPool(sizes, width)
        self.time_mlp = TimeMLP(width) if sizes.takes_noise else None
        width_in = 2 * width + sizes.horizon * sizes.action_dim if sizes.takes_noise else width
        self.enter = nn.Linear(width_in, width)
        self.blocks = nn.Sequential(*(ResidualBlock(width, dropout) for _ in range(num_blocks)))
        self.leave = nn.Linear(width, sizes.horizon * sizes.output_width)

    def forward(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], context: ContextTokens
    ) -> Float[Tensor, "b k o"]:
        check_horizon(x_t, self.horizon)
        x = self.context_pool(context)
        if self.time_mlp is not None:
            chunk = rearrange(x_t, "b k a -> b (k a)").to(x.dtype)
            x = torch.cat((chunk, self.time_mlp(time), x), dim=-1)
        x = self.leave(nn.functional.silu(self.blocks(self.enter(x))))
        return rearrange(x, "b (k o) -> b k o", k=self.horizon)
