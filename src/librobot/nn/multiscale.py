"""A fully convolutional backbone that gives its last few feature maps, fine to coarse (system 1 of Helix)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from librobot.nn.positions import sine_map


class ConvBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))): a pre-activation residual block (He et al. 2016b)."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.GroupNorm(num_groups, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(num_groups, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )

    def forward(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m c h w"]:
        return x + self.branch(x)


class MultiScaleEyes(nn.Module):
    """Pictures as tokens of several scales, in one width.

    Level i has `level_channels[i]` channels at 1 / 2^(i+1) of the picture's size. The last `num_levels_read`
    levels become tokens, row by row, finest level first, each with its place in the picture (sines) and its
    level (learned) added. Nothing depends on the picture's size.
    """

    def __init__(
        self,
        level_channels: Sequence[int],
        *,
        num_levels_read: int,
        blocks_per_level: int,
        num_groups: int,
        width: int,
    ) -> None:
        super().__init__()
        if not 1 <= num_levels_read <= len(level_channels):
            raise ValueError(
                f"num_levels_read must lie between 1 and the {len(level_channels)} level_channels, "
                f"found {num_levels_read}"
            )
        for channels in level_channels:
            if channels % num_groups:
                raise ValueError(
                    f"level_channels must be multiples of num_groups={num_groups}, found "
                    f"{list(level_channels)}"
                )
        self.levels = nn.ModuleList()
        for before, channels in zip([3, *level_channels[:-1]], level_channels, strict=True):
            halve = nn.Conv2d(before, channels, 3, stride=2, padding=1, bias=False)
            blocks = [ConvBlock(channels, num_groups) for _ in range(blocks_per_level)]
            self.levels.append(nn.Sequential(halve, *blocks))
        read = level_channels[-num_levels_read:]
        self.norms = nn.ModuleList(nn.GroupNorm(num_groups, channels) for channels in read)
        self.projs = nn.ModuleList(nn.Linear(channels, width) for channels in read)
        self.level_embedding = nn.Parameter(0.02 * torch.randn(num_levels_read, width))

    def forward(self, pixels: Float[Tensor, "m 3 h w"]) -> Float[Tensor, "m l d"]:
        """`pixels` in [-1, 1]."""
        maps, x = [], pixels
        for level in self.levels:
            x = level(x)
            maps.append(x)
        tokens = []
        for norm, proj, level_vector, features in zip(
            self.norms, self.projs, self.level_embedding, maps[-len(self.projs) :], strict=True
        ):
            height, width = features.shape[-2:]
            seen = proj(rearrange(functional.relu(norm(features)), "m c h w -> m h w c"))
            seen = seen + sine_map(height, width, seen.shape[-1]).to(seen) + level_vector
            tokens.append(rearrange(seen, "m h w d -> m (h w) d"))
        return torch.cat(tokens, dim=1)
