"""Gaussian blur, as of a camera out of focus."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional

from librobot.data.augmentations.base import between, check_range, check_share, chosen, on_images
from librobot.types import Batch


class Blur:
    """sigma: of the Gaussian, in pixels, drawn from this range for each sample and camera. probability: the
    share of samples that are blurred. All steps of a window are blurred alike."""

    def __init__(
        self,
        *,
        sigma: Sequence[float] = (0.1, 2.0),
        probability: float = 0.5,
        cameras: Sequence[str] | None = None,
    ) -> None:
        self.sigma = check_range("sigma", sigma, 0.01, 100.0)
        self.probability = check_share("probability", probability)
        self.cameras = None if cameras is None else list(cameras)

    def __call__(self, batch: Batch, *, seed: Sequence[int]) -> Batch:
        return on_images(batch, self.blur, seed=seed, cameras=self.cameras)

    def blur(
        self, images: UInt8[Tensor, "b t c h w"], generator: torch.Generator
    ) -> UInt8[Tensor, "b t c h w"]:
        """One camera's images."""
        sigma = between(self.sigma, len(images), generator)
        which = chosen(len(images), self.probability, generator).nonzero().squeeze(1)
        if not len(which):
            return images
        own = which.to(images.device)
        picked = images.index_select(0, own)
        height, width = images.shape[-2:]
        steps, colours = images.shape[1:3]
        reach = min(max(1, int(3 * self.sigma[1] + 0.5)), height - 1, width - 1)  # what reflection allows
        offsets = torch.arange(-reach, reach + 1)
        kernel = torch.exp(-0.5 * (offsets / sigma[which, None]).square())
        kernel = (kernel / kernel.sum(dim=1, keepdim=True)).to(images.device)
        kernel = repeat(kernel, "b r -> (b n) 1 1 r", n=steps * colours)
        # One group of the convolution for each picture and colour, first along rows, then along columns.
        flat = rearrange(picked, "b t c h w -> 1 (b t c) h w").float()
        flat = functional.pad(flat, (reach,) * 4, mode="reflect")
        flat = functional.conv2d(flat, kernel, groups=len(kernel))
        flat = functional.conv2d(flat, kernel.transpose(2, 3), groups=len(kernel))
        blurred = flat.round().clamp(0, 255).to(torch.uint8).view(picked.shape)
        return images.index_copy(0, own, blurred)
