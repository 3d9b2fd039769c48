"""The part of a picture that OpenVLA and OpenVLA-OFT see: anywhere in training, the middle later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float

from librobot import replicas
from librobot.nn.pictures import crop_area
from librobot.types import Observation

Acting = float | Literal["auto"] | None


class PictureCrop:
    """Shares of a picture's area: `training` is cut out at a place of chance, the same for a sample's
    observation steps, `acting` from the middle, which is what the network saw on average; None leaves
    pictures whole. "auto" acts on the share that training cuts. Raises ValueError for what is no share."""

    def __init__(self, training: float | None, acting: Acting) -> None:
        if acting == "auto":
            acting = training
        if isinstance(acting, str) or (acting is not None and not 0.0 < acting <= 1.0):
            raise ValueError(f"acting_crop must be auto, null, or above 0 and at most 1, found {acting!r}")
        self.training, self.acting = training, acting

    def __call__(self, observation: Observation, *, training: bool) -> Observation:
        area = self.training if training else self.acting
        if area is None:
            return observation
        images = {}
        for name, image in observation.images.items():
            shift = 2 * replicas.draw(drawn_shifts(image.device), len(image)) - 1 if training else None
            images[name] = crop_area(image, area, shift)
        return replace(observation, images=images)


def drawn_shifts(device: torch.device) -> Callable[[int], Float[torch.Tensor, "n 2"]]:
    return lambda n: torch.rand(n, 2, device=device)
