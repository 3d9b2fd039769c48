"""Sensor noise on pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor

from librobot.data.augmentations.base import between, check_range, check_share, chosen, on_images
from librobot.types import Batch


class PixelNoise:
    """std: of Gaussian noise, as a share of the range of pixels, drawn from this range for each sample and
    camera. probability: the share of samples that get it.

    All steps of a window get the same noise, as that of a sensor with a fixed pattern. The noise itself is
    drawn on the batch's device, so that another kind of device draws other noise.
    """

    def __init__(
        self,
        *,
        std: Sequence[float] = (0.0, 0.05),
        probability: float = 0.5,
        cameras: Sequence[str] | None = None,
    ) -> None:
        self.std = check_range("std", std, 0.0, 1.0)
        self.probability = check_share("probability", probability)
        self.cameras = None if cameras is None else list(cameras)

    def __call__(self, batch: Batch, *, seed: Sequence[int]) -> Batch:
        return on_images(batch, self.disturb, seed=seed, cameras=self.cameras)

    def disturb(
        self, images: UInt8[Tensor, "b t c h w"], generator: torch.Generator
    ) -> UInt8[Tensor, "b t c h w"]:
        """One camera's images."""
        std = 255 * between(self.std, len(images), generator)
        std = torch.where(chosen(len(images), self.probability, generator), std, 0.0).to(images.device)
        seed = int(torch.randint(2**62, (), generator=generator))
        own = torch.Generator(device=images.device).manual_seed(seed)
        shape = (len(images), 1, *images.shape[2:])
        noise = torch.randn(shape, generator=own, device=images.device) * std[:, None, None, None, None]
        return (images + noise).round_().clamp_(0, 255).to(torch.uint8)
