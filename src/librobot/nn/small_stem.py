"""Octo's eyes: a few convolutions before the patches (Octo Model Team 2024; Xiao et al. 2021, "Early
convolutions help transformers see better")."""

from __future__ import annotations

from collections.abc import Sequence

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class StdConv(nn.Conv2d):
    """A convolution whose kernels are standardised, each output channel's on its own: mean 0, deviation 1
    (Qiao et al. 2019)."""

    def standardised(self) -> Float[Tensor, "o c y x"]:
        kernel = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return kernel / (kernel.std(dim=(1, 2, 3), correction=0, keepdim=True) + 1e-5)

    def forward(self, x: Float[Tensor, "m c h w"]) -> Float[Tensor, "m o y x"]:
        return functional.conv2d(x, self.standardised(), self.bias, self.stride, self.padding)


class SmallStem(nn.Module):
    """Pictures to patches: convolutions of stride 2, each with a group norm and ReLU, then a linear map.

    With the four `channels` of SmallStem16 a patch is 16 pixels wide, so that 256 pixels make 16 x 16 tokens,
    row by row, and 128 pixels 8 x 8. `in_channels` is 6 where a goal picture is stacked behind the observed.
    """

    def __init__(
        self, channels: Sequence[int] = (32, 96, 192, 384), *, num_groups: int, in_channels: int, width: int
    ) -> None:
        super().__init__()
        for number in channels:
            if number % num_groups:
                raise ValueError(
                    f"stem_channels must be multiples of num_groups={num_groups}, found {list(channels)}"
                )
        before = [in_channels, *channels[:-1]]
        self.patch_size = 2 ** len(channels)
        self.convs = nn.ModuleList(
            StdConv(i, o, 3, stride=2, padding=1) for i, o in zip(before, channels, strict=True)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(num_groups, number, eps=1e-6) for number in channels)
        self.embedding = nn.Linear(channels[-1], width)

    def num_tokens(self, size: int) -> int:
        """Of a square picture of `size` pixels. Raises ValueError where patches do not tile it."""
        if size % self.patch_size:
            raise ValueError(f"pictures must be a multiple of {self.patch_size} pixels wide, found {size}")
        return (size // self.patch_size) ** 2

    def forward(self, pixels: Float[Tensor, "m c h w"]) -> Float[Tensor, "m l d"]:
        """`pixels` in [-1, 1]."""
        x = pixels
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = functional.relu(norm(conv(x)))
        return self.embedding(rearrange(x, "m c h w -> m (h w) c"))
