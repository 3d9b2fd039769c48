"""Crops of random size, shape, place and turn, brought back to the picture's size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional

from librobot.data.augmentations.base import between, check_range, check_share, chosen, on_images
from librobot.types import Batch


class RandomCrop:
    """scale: the crop's share of the picture's area. ratio: its width over its height, as a factor on the
    picture's own. rotate: turned by up to so many degrees either way; borders repeat the edge. probability:
    the share of samples that are cropped. cameras: those that are cropped; None for all (openpi leaves wrist
    cameras alone).

    Every sample and camera has its own draw, the same for all steps of a window. Bilinear.
    """

    def __init__(
        self,
        *,
        scale: Sequence[float] = (0.9, 1.0),
        ratio: Sequence[float] = (1.0, 1.0),
        rotate: float = 0.0,
        probability: float = 1.0,
        cameras: Sequence[str] | None = None,
    ) -> None:
        self.scale = check_range("scale", scale, 0.01, 1.0)
        self.ratio = check_range("ratio", ratio, 0.1, 10.0)
        self.rotate = check_share("rotate", rotate, 180.0)
        self.probability = check_share("probability", probability)
        self.cameras = None if cameras is None else list(cameras)

    def __call__(self, batch: Batch, *, seed: Sequence[int]) -> Batch:
        return on_images(batch, self.crop, seed=seed, cameras=self.cameras)

    def crop(
        self, images: UInt8[Tensor, "b t c h w"], generator: torch.Generator
    ) -> UInt8[Tensor, "b t c h w"]:
        """One camera's images."""
        count, (height, width) = len(images), images.shape[-2:]
        area, stretch = between(self.scale, count, generator), between(self.ratio, count, generator).sqrt()
        # In units of half the picture's sides; a crop that is stretched beyond the picture ends there.
        tall, wide = (area.sqrt() / stretch).clamp_max(1.0), (area.sqrt() * stretch).clamp_max(1.0)
        centre = between((-1.0, 1.0), (2, count), generator) * torch.stack((1 - wide, 1 - tall))
        turn = between((-1.0, 1.0), count, generator) * math.radians(self.rotate)
        cosine, sine = turn.cos(), turn.sin()
        theta = torch.stack(
            (
                torch.stack((wide * cosine, -tall * sine * height / width, centre[0]), dim=-1),
                torch.stack((wide * sine * width / height, tall * cosine, centre[1]), dim=-1),
            ),
            dim=1,
        )
        cropped = chosen(count, self.probability, generator)
        theta[~cropped] = torch.eye(2, 3)
        grid = functional.affine_grid(theta.to(images.device), [count, 1, height, width], align_corners=False)
        flat = rearrange(images, "b t c h w -> b (t c) h w").float()
        out = functional.grid_sample(flat, grid, padding_mode="border", align_corners=False)
        return out.round().clamp(0, 255).to(torch.uint8).view(images.shape)
