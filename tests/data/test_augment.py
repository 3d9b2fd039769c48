from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from librobot.data.augment import ImageAugmentation
from librobot.data.datamodule import DataModule
from librobot.types import Batch, Observation

OFF = dict.fromkeys(("shift", "zoom", "brightness", "contrast", "saturation", "hue"), 0.0)
PARTS = {"shift": 0.2, "zoom": 0.4, "brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.3}


def make_batch(images: dict[str, Tensor]) -> Batch:
    num, steps = next(iter(images.values())).shape[:2]
    observation = Observation(
        images=images,
        image_mask={camera: torch.ones(num, dtype=torch.bool) for camera in images},
        state=torch.randn(num, steps, 3),
        prompt=["go"] * num,
    )
    return Batch(
        observation=observation,
        actions=torch.randn(num, 4, 2),
        action_mask=torch.ones(num, 4, dtype=torch.bool),
        extra={"rows": np.arange(num)},
    )


def random_images(num: int = 6, steps: int = 3, height: int = 20, width: int = 30) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, steps, 3, height, width), generator=generator, dtype=torch.uint8)


def augmented(images: Tensor, seed: int = 0, **amounts: float) -> Tensor:
    augmentation = ImageAugmentation(**{**OFF, **amounts})
    return augmentation(make_batch({"front": images}), seed=(seed,)).observation.images["front"]


@pytest.mark.parametrize("part", PARTS)
def test_each_part_changes_pixels_and_nothing_else(part: str) -> None:
    batch = make_batch({"front": random_images(), "wrist": random_images(height=8, width=8)})
    before = {camera: images.clone() for camera, images in batch.observation.images.items()}
    found = ImageAugmentation(**{**OFF, part: PARTS[part]})(batch, seed=(1,))
    assert list(found.observation.images) == ["front", "wrist"]
    for camera, images in found.observation.images.items():
        assert images.shape == before[camera].shape
        assert images.dtype == torch.uint8
        assert not torch.equal(images, before[camera])
        assert torch.equal(batch.observation.images[camera], before[camera])
    assert found.observation.state is batch.observation.state
    assert found.observation.prompt is batch.observation.prompt
    assert found.actions is batch.actions
    assert found.action_mask is batch.action_mask


def test_everything_off_changes_nothing() -> None:
    images = random_images()
    assert torch.equal(augmented(images), images)


@pytest.mark.parametrize("part", PARTS)
def test_one_draw_for_all_the_steps_of_a_sample(part: str) -> None:
    """Equal frames stay equal over time; samples and cameras differ from each other."""
    still = random_images(steps=1).expand(-1, 3, -1, -1, -1)
    still = still[:1].expand(6, -1, -1, -1, -1)
    augmentation = ImageAugmentation(**{**OFF, part: PARTS[part]})
    images = augmentation(make_batch({"front": still, "wrist": still}), seed=(2,)).observation.images
    for found in images.values():
        assert torch.equal(found[:, 0], found[:, 1])
        assert torch.equal(found[:, 0], found[:, 2])
        assert len({tuple(sample.flatten().tolist()) for sample in found[:, 0]}) > 1
    assert not torch.equal(images["front"], images["wrist"])


def test_the_seed_decides() -> None:
    images = random_images()
    first = augmented(images, 1, **PARTS)
    torch.rand(5)
    assert torch.equal(augmented(images, 1, **PARTS), first)
    assert not torch.equal(augmented(images, 2, **PARTS), first)


def test_a_shift_moves_whole_pixels_and_repeats_the_edge() -> None:
    """A picture of coordinates shows where each pixel came from; at most 0.2 of 20 and of 30 pixels."""
    rows, columns = torch.meshgrid(torch.arange(20), torch.arange(30), indexing="ij")
    picture = torch.stack([rows, columns, rows + columns]).to(torch.uint8)
    found = augmented(picture.expand(64, 1, -1, -1, -1), shift=0.2)[:, 0].long()
    moves = set()
    for image in found:
        down, right = int(image[0, 10, 15] - 10), int(image[1, 10, 15] - 15)
        moves.add((down, right))
        assert torch.equal(image[0], (rows + down).clamp(0, 19))
        assert torch.equal(image[1], (columns + right).clamp(0, 29))
        assert torch.equal(image[2], image[0] + image[1])
    assert {abs(down) for down, _ in moves} == set(range(5))
    assert max(abs(right) for _, right in moves) in (5, 6)


def test_a_zoom_is_a_smaller_crop() -> None:
    """On a horizontal ramp the slope shrinks by the crop's scale, which lies in [0.6, 1]."""
    ramp = (torch.arange(64) * 4).to(torch.uint8).expand(32, 1, 3, 64, 64)
    inner = augmented(ramp, zoom=0.4)[:, 0, 0, 32].float()
    slopes = (inner[:, 40] - inner[:, 24]) / 16 / 4
    assert ((slopes > 0.55) & (slopes < 1.02)).all()
    assert slopes.max() - slopes.min() > 0.2


def test_brightness_is_one_factor_per_sample() -> None:
    images = random_images() // 2
    ratio = augmented(images, brightness=0.5).double().sum((1, 2, 3, 4)) / images.double().sum((1, 2, 3, 4))
    assert ((ratio > 0.49) & (ratio < 1.51)).all()
    assert ratio.max() - ratio.min() > 0.2


def test_contrast_keeps_a_plain_picture_and_the_mean() -> None:
    plain = torch.full((4, 2, 3, 8, 8), 90, dtype=torch.uint8)
    assert torch.equal(augmented(plain, contrast=0.5), plain)
    images = 100 + random_images() // 8
    found = augmented(images, contrast=0.5).double()
    spread = found.std((1, 3, 4)) / images.double().std((1, 3, 4))
    assert ((spread > 0.45) & (spread < 1.55)).all()
    assert spread.max() - spread.min() > 0.2


@pytest.mark.parametrize("part", ["saturation", "hue"])
def test_colour_parts_keep_grey(part: str) -> None:
    grey = random_images()[:, :, :1].expand(-1, -1, 3, -1, -1)
    found = augmented(grey, **{part: PARTS[part]}).int()
    assert (found - grey.int()).abs().max() <= 1


class FixedTrainer:
    """What `on_after_batch_transfer` reads of a trainer."""

    num_training_batches = 2

    def __init__(self, training: bool) -> None:
        self.training = training


@pytest.mark.parametrize("training", [True, False])
def test_the_data_module_augments_in_training_only(array_source: Any, training: bool) -> None:
    module = DataModule(array_source([6]), batch_size=6, augmentation=ImageAugmentation(brightness=0.9))
    module.trainer = FixedTrainer(training)  # type: ignore[assignment]
    images = random_images()
    found = module.on_after_batch_transfer(make_batch({"front": images}), 0).observation.images["front"]
    assert torch.equal(found, images) != training
    module.trainer = None
    assert torch.equal(
        module.on_after_batch_transfer(make_batch({"front": images}), 0).observation.images["front"], images
    )


def test_a_data_module_without_augmentation(array_source: Any) -> None:
    module = DataModule(array_source([6]), batch_size=6)
    module.trainer = SimpleNamespace(training=True, num_training_batches=2)  # type: ignore[assignment]
    batch = make_batch({"front": random_images()})
    assert module.on_after_batch_transfer(batch, 0) is batch


@pytest.mark.parametrize(
    "wrong", [{"shift": 0.6}, {"zoom": 0.95}, {"brightness": -0.1}, {"contrast": 1.5}, {"hue": 0.6}]
)
def test_bad_arguments(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ImageAugmentation(**wrong)
