"""Cameras that fail: their pictures black, their mask False, never all of a sample's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from librobot.data.augmentations.base import check_share, generator_for
from librobot.types import Batch


class CameraDropout:
    """probability: of each camera, in each sample, alike for all steps of a window. One of the cameras that
    the sample has is always kept, each as likely as the others. cameras: those that may fail; None for all.

    For frameworks that can act without one of their cameras (`Framework.masks_cameras`).
    """

    drops_cameras = True

    def __init__(self, *, probability: float = 0.1, cameras: Sequence[str] | None = None) -> None:
        self.probability = check_share("probability", probability)
        self.cameras = None if cameras is None else list(cameras)

    def __call__(self, batch: Batch, *, seed: Sequence[int]) -> Batch:
        names, generator = sorted(batch.observation.image_mask), generator_for(seed)
        if not names:
            return batch
        device = batch.observation.image_mask[names[0]].device
        shape = (batch.batch_size, len(names))
        lost = torch.rand(shape, generator=generator) < self.probability
        order = torch.rand(shape, generator=generator).to(device)
        if self.cameras is not None:
            lost &= torch.tensor([name in self.cameras for name in names])
        has = torch.stack([batch.observation.image_mask[name] for name in names], dim=1)
        seen = has & ~lost.to(device)
        # Where none would be left, the first of a random order of those that there are.
        kept = (order + 2.0 * ~has).argmin(dim=1, keepdim=True)
        spared = torch.zeros_like(seen).scatter_(1, kept, True) & has & ~seen.any(dim=1, keepdim=True)
        seen = seen | spared
        masks = {name: seen[:, i] for i, name in enumerate(names)}
        images = {
            name: pictures * masks[name].view(-1, 1, 1, 1, 1).to(pictures.dtype)
            for name, pictures in batch.observation.images.items()
        }
        masks = {name: masks[name] for name in batch.observation.image_mask}
        return replace(batch, observation=replace(batch.observation, images=images, image_mask=masks))
