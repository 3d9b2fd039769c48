"""Rectangles without content, as of something that hides the scene (cut-out, DeVries and Taylor 2017; random
erasing, Zhong et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import UInt8
from torch import Tensor

from librobot.data.augmentations.base import between, check_range, check_share, chosen, on_images
from librobot.types import Batch

Fill = Literal["black", "grey", "random"]


class Cutout:
    """count: rectangles in a picture. size: their sides as shares of the picture's, drawn from this range.
    fill: black, grey (the middle), or one random colour each. probability: the share of samples.

    Every sample and camera has its own places, the same for all steps of a window.
    """

    def __init__(
        self,
        *,
        count: int = 1,
        size: Sequence[float] = (0.1, 0.3),
        fill: Fill = "random",
        probability: float = 0.5,
        cameras: Sequence[str] | None = None,
    ) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, found {count}")
        if fill not in get_args(Fill):
            raise ValueError(f"fill must be one of {', '.join(get_args(Fill))}, found {fill!r}")
        self.count, self.fill = count, fill
        self.size = check_range("size", size, 0.0, 1.0)
        self.probability = check_share("probability", probability)
        self.cameras = None if cameras is None else list(cameras)

    def __call__(self, batch: Batch, *, seed: Sequence[int]) -> Batch:
        return on_images(batch, self.cut, seed=seed, cameras=self.cameras)

    def cut(
        self, images: UInt8[Tensor, "b t c h w"], generator: torch.Generator
    ) -> UInt8[Tensor, "b t c h w"]:
        """One camera's images."""
        samples = len(images)
        which = chosen(samples, self.probability, generator)
        out = images.clone()
        for _ in range(self.count):
            rows = self._stretch(images.shape[-2], samples, generator)
            columns = self._stretch(images.shape[-1], samples, generator)
            inside = (which[:, None, None] & rows[:, :, None] & columns[:, None, :]).to(images.device)
            colours = self._colours(samples, images.shape[2], generator).to(images.device)
            out = torch.where(inside[:, None, None], colours[:, None, :, None, None], out)
        return out

    def _stretch(self, side: int, samples: int, generator: torch.Generator) -> Tensor:
        """Which of `side` pixels a rectangle covers, (samples, side)."""
        length = (between(self.size, samples, generator) * side).round()
        begin = (torch.rand(samples, generator=generator) * (side - length + 1)).floor()
        place = torch.arange(side)
        return (begin[:, None] <= place) & (place < (begin + length)[:, None])

    def _colours(self, samples: int, colours: int, generator: torch.Generator) -> UInt8[Tensor, "b c"]:
        if self.fill == "random":
            return torch.randint(256, (samples, colours), generator=generator, dtype=torch.uint8)
        return torch.full((samples, colours), 0 if self.fill == "black" else 127, dtype=torch.uint8)
