"""Diffusion Policy's picture encoder: crop, ResNet-18, spatial softmax (Chi et al. 2023, section III-A)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from librobot.nn.resnet import ResNet18


class SpatialSoftmax(nn.Module):
    """Where each of `num_keypoints` features is: the mean position, x and y in [-1, 1], under the softmax of
    its map (Finn et al. 2016)."""

    def __init__(self, channels: int, num_keypoints: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, num_keypoints, 1)

    def forward(self, features: Float[Tensor, "m c h w"]) -> Float[Tensor, "m p 2"]:
        weights = self.proj(features)
        h, w = weights.shape[-2:]
        weights = rearrange(weights, "m p h w -> m p (h w)").softmax(dim=-1)
        return weights @ position_grid(h, w).to(weights)


def position_grid(height: int, width: int) -> Float[Tensor, "hw 2"]:
    """x and y of every cell, row by row; the outermost cells are at -1 and 1 (a single one at -1)."""
    x = torch.linspace(-1.0, 1.0, width, dtype=torch.float64)
    y = torch.linspace(-1.0, 1.0, height, dtype=torch.float64)
    return torch.stack((x.repeat(height), y.repeat_interleave(width)), dim=-1).float()


class KeypointEncoder(nn.Module):
    """Pictures to vectors of twice `num_keypoints` numbers.

    `crop` is the share of each side that is kept (1: all), or its pixels [h, w]: a random place in each
    picture while training, the centre otherwise.
    """

    def __init__(self, resnet: ResNet18, *, num_keypoints: int, crop: float | Sequence[int]) -> None:
        super().__init__()
        if isinstance(crop, (int, float)) and not 0 < crop <= 1:
            raise ValueError(f"crop must be a share above 0 and at most 1, or pixels [h, w], found {crop}")
        self.crop = crop
        self.resnet = resnet
        self.pool = SpatialSoftmax(resnet.channels, num_keypoints)
        self.width = 2 * num_keypoints
        self.out_proj = nn.Linear(self.width, self.width)

    def forward(self, pixels: Float[Tensor, "m 3 h w"], camera: int = 0) -> Float[Tensor, "m f"]:
        features = self.resnet(self.cropped(pixels), camera)
        return functional.relu(self.out_proj(self.pool(features).flatten(1)))

    def cropped(self, pixels: Float[Tensor, "m 3 h w"]) -> Float[Tensor, "m 3 y x"]:
        size = pixels.shape[-2:]
        height, width = self.crop_size(*size)
        if (height, width) == tuple(size):
            return pixels
        if height > size[0] or width > size[1]:
            raise ValueError(
                f"crop must fit into the pictures of {tuple(size)} pixels, found {[height, width]}"
            )
        free = size[0] - height, size[1] - width
        if not self.training:
            top, left = round(free[0] / 2), round(free[1] / 2)
            return pixels[..., top : top + height, left : left + width]
        tops, lefts = (torch.randint(n + 1, (len(pixels), 1), device=pixels.device) for n in free)
        return windows(pixels, tops, lefts, height, width)

    def crop_size(self, height: int, width: int) -> tuple[int, int]:
        """What is left of a picture of this size, in pixels."""
        if isinstance(self.crop, (int, float)):
            return int(self.crop * height), int(self.crop * width)
        return self.crop[0], self.crop[1]


def windows(
    pixels: Float[Tensor, "m c h w"],
    top: Int[Tensor, "m 1"],
    left: Int[Tensor, "m 1"],
    height: int,
    width: int,
) -> Float[Tensor, "m c height width"]:
    """A window of each picture, at a place of its own."""
    rows = top + torch.arange(height, device=pixels.device)
    columns = left + torch.arange(width, device=pixels.device)
    index = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return pixels.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
