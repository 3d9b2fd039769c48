"""Octo's score network: a residual MLP over one embedding, one time and a flattened chunk (Octo Model Team
2024, appendix; IDQL, Hansen-Estruch et al. 2023; code octo `diffusion.py`)."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

NUM_LEVELS = 20
"""Octo numbers its noise levels 0 to 19; a head's time 1/20 to 1 is mapped onto these."""


class FourierFeatures(nn.Module):
    """Cosines, then sines, of 2 pi w x with learned frequencies w."""

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"time_width must be even, found {width}")
        self.frequencies = nn.Parameter(0.2 * torch.randn(width // 2))

    def forward(self, x: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        angle = 2 * math.pi * x[:, None] * self.frequencies
        return torch.cat((angle.cos(), angle.sin()), dim=-1)


class ResidualBlock(nn.Module):
    """x + linear(swish(linear(norm(x)))), four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.enter = nn.Linear(width, 4 * width)
        self.leave = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        return x + self.leave(nn.functional.silu(self.enter(self.norm(x))))


class ScoreNetwork(nn.Module):
    """[time, embedding, chunk] -> a number for each of `output_width` per action.

    With `takes_noise` False (deterministic heads) the embedding enters alone.
    """

    def __init__(
        self,
        embedding_width: int,
        *,
        horizon: int,
        action_dim: int,
        output_width: int,
        takes_noise: bool,
        width: int = 256,
        num_blocks: int = 3,
        time_width: int = 32,
    ) -> None:
        super().__init__()
        self.horizon, self.takes_noise = horizon, takes_noise
        if takes_noise:
            self.time_features = FourierFeatures(time_width)
            self.time_mlp = nn.Sequential(
                nn.Linear(time_width, 2 * time_width), nn.SiLU(), nn.Linear(2 * time_width, time_width)
            )
        extra = time_width + horizon * action_dim if takes_noise else 0
        self.enter = nn.Linear(extra + embedding_width, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(num_blocks))
        self.leave = nn.Linear(width, horizon * output_width)
        for linear in (self.enter, self.leave):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], embedding: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b k o"]:
        """`time` in [0, 1], 1 is noise."""
        x = embedding
        if self.takes_noise:
            level = NUM_LEVELS * time - 1
            chunk = rearrange(x_t, "b k a -> b (k a)").to(embedding)
            x = torch.cat((self.time_mlp(self.time_features(level.to(embedding))), embedding, chunk), dim=-1)
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return rearrange(self.leave(nn.functional.silu(x)), "b (k o) -> b k o", k=self.horizon)
