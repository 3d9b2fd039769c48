"""One-dimensional U-Net over the steps of a chunk (Janner et al. 2022, Diffuser), conditioned by FiLM as in
Diffusion Policy (Chi et al. 2023, section III)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from librobot.networks.base import ContextTokens, Network, Sizes
from librobot.networks.inputs import ContextPool, Pool, TimeMLP, check_horizon


class ConvolutionBlock(nn.Sequential):
    """Convolution over steps, group norm, Mish."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, num_groups: int) -> None:
        super().__init__(
            nn.Conv1d(channels_in, channels_out, kernel_size, padding=kernel_size // 2),
            nn.GroupNorm(num_groups, channels_out),
            nn.Mish(),
        )


class ConditionalResidualBlock(nn.Module):
    """Two convolution blocks with FiLM (Perez et al. 2018) between them: the condition adds a bias to each
    channel, and with `film_scale` multiplies it too."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        condition_width: int,
        kernel_size: int,
        num_groups: int,
        film_scale: bool,
    ) -> None:
        super().__init__()
        self.film_scale = film_scale
        self.first = ConvolutionBlock(channels_in, channels_out, kernel_size, num_groups)
        self.second = ConvolutionBlock(channels_out, channels_out, kernel_size, num_groups)
        self.film = nn.Sequential(
            nn.Mish(), nn.Linear(condition_width, (2 if film_scale else 1) * channels_out)
        )
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != channels_out:
            self.shortcut = nn.Conv1d(channels_in, channels_out, 1)

    def forward(self, x: Float[Tensor, "b c k"], condition: Float[Tensor, "b f"]) -> Float[Tensor, "b e k"]:
        y = self.first(x)
        film = self.film(condition)[..., None]
        if self.film_scale:
            scale, bias = film.chunk(2, dim=1)
            y = scale * y + bias
        else:
            y = y + film
        return self.second(y) + self.shortcut(x)


class Level(nn.Module):
    """Two residual blocks at one resolution, and the step to the next one."""

    def __init__(
        self, first: ConditionalResidualBlock, second: ConditionalResidualBlock, resample: nn.Module
    ) -> None:
        super().__init__()
        self.first, self.second, self.resample = first, second, resample

    def forward(
        self, x: Float[Tensor, "b c k"], condition: Float[Tensor, "b f"]
    ) -> tuple[Float[Tensor, "b e k"], Float[Tensor, "b e j"]]:
        """At this resolution, and at the next."""
        x = self.second(self.first(x, condition), condition)
        return x, self.resample(x)


class ConditionalUNet1D(nn.Module):
    """The U-Net over any sequence of vectors, given one conditioning vector.

    `level_channels` are the channels of each resolution; each is half of the one before in steps. Steps that
    are no multiple of 2^(levels - 1) are padded with the last one, and cropped at the end. As in the
    published code there is a way up for every level but the last, so that the finest level's skip connection
    has no use. `last_groups` are those of the last block's norm (None: as in all others).
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        condition_width: int,
        *,
        level_channels: Sequence[int],
        kernel_size: int,
        num_groups: int,
        film_scale: bool,
        last_groups: int | None = None,
    ) -> None:
        super().__init__()
        levels = list(level_channels)
        if not levels or num_groups < 1 or any(c < 2 * num_groups or c % num_groups for c in levels):
            raise ValueError(
                f"level_channels must be multiples of num_groups={num_groups}, at least twice as many, "
                f"found {levels}"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, found {kernel_size}")

        def block(first: int, second: int) -> ConditionalResidualBlock:
            return ConditionalResidualBlock(
                first, second, condition_width, kernel_size, num_groups, film_scale
            )

        def down(index: int) -> nn.Module:
            c = levels[index]
            return nn.Identity() if index == len(levels) - 1 else nn.Conv1d(c, c, 3, stride=2, padding=1)

        self.down = nn.ModuleList(
            Level(block(before, after), block(after, after), down(i))
            for i, (before, after) in enumerate(pairwise([channels_in, *levels]))
        )
        self.middle = nn.ModuleList(block(levels[-1], levels[-1]) for _ in range(2))
        self.up = nn.ModuleList(
            Level(
                block(2 * coarse, fine),
                block(fine, fine),
                nn.ConvTranspose1d(fine, fine, 4, stride=2, padding=1),
            )
            for coarse, fine in pairwise(reversed(levels))
        )
        self.last = ConvolutionBlock(levels[0], levels[0], kernel_size, last_groups or num_groups)
        self.output_proj = nn.Conv1d(levels[0], channels_out, 1)
        self.multiple = 2 ** (len(levels) - 1)

    def forward(self, x: Float[Tensor, "b k c"], condition: Float[Tensor, "b f"]) -> Float[Tensor, "b k o"]:
        num_steps = x.shape[1]
        padding = repeat(x[:, -1], "b c -> b p c", p=-num_steps % self.multiple)
        x = rearrange(torch.cat((x, padding), dim=1), "b k c -> b c k")
        skips: list[Tensor] = []
        for level in self.down:
            skip, x = level(x, condition)
            skips.append(skip)
        for block in self.middle:
            x = block(x, condition)
        for level in self.up:
            _, x = level(torch.cat((x, skips.pop()), dim=1), condition)
        x = self.output_proj(self.last(x))
        return rearrange(x, "b c k -> b k c")[:, :num_steps]


class UNet1D(Network):
    """The U-Net conditioned by the time and the pooled context, `width` numbers of each, side by side.

    `pool` is the mean of the context's tokens or one learned query's attention to them (`num_heads`). Without
    noise the input is a learned chunk, and the condition the context alone.
    """

    kind: ClassVar[Literal["denoiser"]] = "denoiser"

    def __init__(
        self,
        *,
        sizes: Sizes,
        width: int = 256,
        level_channels: Sequence[int] = (256, 512, 1024),
        kernel_size: int = 5,
        num_groups: int = 8,
        film_scale: bool = True,
        pool: Pool = "mean",
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        self.horizon = sizes.horizon
        self.time_mlp = TimeMLP(width) if sizes.takes_noise else None
        self.context_pool = ContextPool(sizes, width, pool=pool, num_heads=num_heads)
        channels_in = sizes.action_dim if sizes.takes_noise else width
        self.queries = None if sizes.takes_noise else nn.Parameter(torch.randn(sizes.horizon, width))
        self.core = ConditionalUNet1D(
            channels_in,
            sizes.output_width,
            2 * width if sizes.takes_noise else width,
            level_channels=level_channels,
            kernel_size=kernel_size,
            num_groups=num_groups,
            film_scale=film_scale,
        )

    def forward(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], context: ContextTokens
    ) -> Float[Tensor, "b k o"]:
        check_horizon(x_t, self.horizon)
        condition = self.context_pool(context)
        if self.time_mlp is not None:
            condition = torch.cat((self.time_mlp(time), condition), dim=-1)
        if self.queries is not None:
            x_t = repeat(self.queries, "k d -> b k d", b=len(x_t))
        return self.core(x_t.to(condition.dtype), condition)
