"""Pictures squeezed to one size, their borders cut off, as GR00T N1.7 sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, UInt8
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

Size = tuple[int, int]


def squeezed(
    image: UInt8[Tensor, "b t c h w"] | Float[Tensor, "b t c h w"], size: Size, crop: float = 1.0
) -> Tensor:
    """(b, t, c, *size) in the same dtype: squeezed to `size`, the middle `crop` of each side cut out, that
    brought to `size` again. Bicubic with antialiasing."""
    image = _resized(image, size)
    if crop == 1.0:
        return image
    height, width = (max(1, round(side * crop)) for side in size)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return _resized(image[..., top : top + height, left : left + width], size)


def _resized(image: Tensor, size: Size) -> Tensor:
    if tuple(image.shape[-2:]) == size:
        return image
    made = resize(image.flatten(0, 1), list(size), InterpolationMode.BICUBIC, antialias=True)
    return made.unflatten(0, image.shape[:2])


@dataclass(frozen=True)
class SizedProcessor:
    """A backbone's processor that is told of pictures of this size, whatever size they come in."""

    processor: Callable[..., dict[str, Tensor]]
    size: Size

    def __call__(self, prompts: list[str], images: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        sized = {
            name: image[..., :1, :1].expand(*image.shape[:-2], *self.size)
            for name, image in (images or {}).items()
        }
        return self.processor(prompts, sized)
