"""Image augmentation of a training batch on its device: random shift, zoom and colour.

Every sample and camera has its own draw, the same for all observation steps of a window (a shift that jumps
between two steps would look like motion). Draws come from a CPU generator, so they are the same on any
device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from librobot.types import Batch

LUMA = (0.299, 0.587, 0.114)
"""Grey from red, green and blue (ITU-R BT.601)."""


class ImageAugmentation:
    """Random crops and colours; every argument at 0 switches that part off.

    shift: largest move as a share of the image's side; uncovered borders repeat the edge (as in DrQ, Yarats
    et al. 2021). zoom: the crop is up to this share smaller than the image, and resized back. brightness,
    contrast, saturation: factors are drawn from [1 - x, 1 + x]. hue: rotation of the colours by up to this
    share of a full turn.
    """

    def __init__(
        self,
        *,
        shift: float = 0.05,
        zoom: float = 0.0,
        brightness: float = 0.2,
        contrast: float = 0.2,
        saturation: float = 0.2,
        hue: float = 0.02,
    ) -> None:
        limits = {
            "shift": 0.5,
            "zoom": 0.9,
            "brightness": 1.0,
            "contrast": 1.0,
            "saturation": 1.0,
            "hue": 0.5,
        }
        self.amounts = {
            "shift": shift,
            "zoom": zoom,
            "brightness": brightness,
            "contrast": contrast,
            "saturation": saturation,
            "hue": hue,
        }
        for name, amount in self.amounts.items():
            if not 0 <= amount <= limits[name]:
                raise ValueError(f"augmentation {name} must lie in [0, {limits[name]}], found {amount}")

    def __call__(self, batch: Batch, *, seed: Sequence[int]) -> Batch:
        """A batch with other images; nothing else changes. The same `seed` gives the same draws."""
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence(list(seed)).generate_state(1)[0])
        )
        images = batch.observation.images
        augmented = {camera: self.augment(images[camera], generator) for camera in sorted(images)}
        observation = replace(batch.observation, images={camera: augmented[camera] for camera in images})
        return replace(batch, observation=observation)

    def augment(
        self, images: UInt8[Tensor, "b t c h w"], generator: torch.Generator
    ) -> UInt8[Tensor, "b t c h w"]:
        """One camera's images."""
        if self.amounts["zoom"]:
            images = self._zoom_and_shift(images, generator)
        elif self.amounts["shift"]:
            images = self._shift(images, generator)
        if any(self.amounts[name] for name in ("brightness", "contrast", "saturation", "hue")):
            images = self._colour(images, generator)
        return images

    def _shift(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Whole pixels, as one gather."""
        height, width = images.shape[-2:]
        count, device = len(images), images.device
        rows = self._moved(height, count, generator).to(device)
        columns = self._moved(width, count, generator).to(device)
        index = rearrange(rows, "b h -> b 1 h 1") * width + rearrange(columns, "b w -> b 1 1 w")
        flat = rearrange(images, "b t c h w -> b (t c) (h w)")
        index = rearrange(index, "b 1 h w -> b 1 (h w)").expand(-1, flat.shape[1], -1)
        return flat.gather(2, index).view(images.shape)

    def _moved(self, side: int, count: int, generator: torch.Generator) -> Tensor:
        limit = round(self.amounts["shift"] * side)
        offset = torch.randint(-limit, limit + 1, (count, 1), generator=generator)
        return (torch.arange(side) + offset).clamp(0, side - 1)

    def _zoom_and_shift(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Crops of a random size and place, resampled bilinearly."""
        count = len(images)
        scale = 1 - self.amounts["zoom"] * torch.rand(count, generator=generator)
        room = (1 - scale)[:, None] + 2 * self.amounts["shift"]
        centre = (2 * torch.rand(count, 2, generator=generator) - 1) * room
        theta = torch.zeros(count, 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = scale
        theta[:, :, 2] = centre
        height, width = images.shape[-2:]
        grid = functional.affine_grid(theta.to(images.device), [count, 1, height, width], align_corners=False)
        flat = rearrange(images, "b t c h w -> b (t c) h w").float()
        out = functional.grid_sample(flat, grid, padding_mode="border", align_corners=False)
        return out.round().clamp(0, 255).to(torch.uint8).view(images.shape)

    def _colour(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Brightness, contrast, saturation and hue are all affine in RGB: one 3x3 matrix and offset per
        sample."""
        matrix = self._colour_matrices(len(images), generator).to(images.device)
        contrast = self._factors("contrast", len(images), generator).to(images.device)
        pixels = rearrange(images, "b t c h w -> b t c (h w)").float()
        # Contrast pulls towards the image's own mean grey.
        grey = torch.einsum("btcp,c->b", pixels, pixels.new_tensor(LUMA)) / pixels[0, :, 0].numel()
        offset = (1 - contrast) * grey
        out = (contrast[:, None, None] * matrix)[:, None] @ pixels + offset[:, None, None, None]
        return out.round_().clamp_(0, 255).to(torch.uint8).view(images.shape)

    def _colour_matrices(self, count: int, generator: torch.Generator) -> Float[Tensor, "b 3 3"]:
        """brightness * hue rotation * saturation."""
        luma = torch.tensor(LUMA)
        grey = luma.expand(3, 3)
        saturation = self._factors("saturation", count, generator)[:, None, None]
        saturate = saturation * torch.eye(3) + (1 - saturation) * grey
        turn = (2 * torch.rand(count, generator=generator) - 1) * self.amounts["hue"] * 2 * math.pi
        # Rotation about the grey axis (1, 1, 1): Rodrigues' formula.
        axis = torch.full((3, 3), 1 / 3)
        cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
        cosine, sine = turn.cos()[:, None, None], turn.sin()[:, None, None]
        rotate = cosine * torch.eye(3) + (1 - cosine) * axis + sine * cross
        brightness = self._factors("brightness", count, generator)[:, None, None]
        return brightness * (rotate @ saturate)

    def _factors(self, name: str, count: int, generator: torch.Generator) -> Float[Tensor, " b"]:
        return 1 + (2 * torch.rand(count, generator=generator) - 1) * self.amounts[name]
