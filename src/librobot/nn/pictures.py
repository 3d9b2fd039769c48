"""Pictures brought to a model's size without changing what is in them."""

from __future__ import annotations

from einops import pack, unpack
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional


def resize_with_pad(
    images: UInt8[Tensor, "*b c h w"] | Float[Tensor, "*b c h w"],
    height: int,
    width: int,
    *,
    sides: str = "centre",
) -> Float[Tensor, "*b c height width"]:
    """Scale pictures into `height` x `width` pixels with their own aspect ratio; black fills the rest.

    uint8 in [0, 255] or floats in [0, 1] come out as floats in [0, 1] (uint8 values are rounded after
    scaling, as they would be as a picture). Bilinear without antialiasing, as in the
    PyTorch code of openpi and lerobot.
    `sides` "centre" pads on both sides (openpi), "left_top" before the picture (lerobot's SmolVLA).
    """
    if sides not in ("centre", "left_top"):
        raise ValueError(f"sides must be 'centre' or 'left_top', found {sides!r}")
    flat, leading = pack([images], "* c h w")
    is_uint8 = not images.is_floating_point()
    flat = flat.float() if is_uint8 else flat
    h, w = flat.shape[-2:]
    if (h, w) != (height, width):
        ratio = max(w / width, h / height)
        new_h, new_w = int(h / ratio), int(w / ratio)
        flat = functional.interpolate(flat, (new_h, new_w), mode="bilinear", align_corners=False)
        limit = 255.0 if is_uint8 else 1.0
        flat = (flat.round() if is_uint8 else flat).clamp(0.0, limit)
        missing_h, missing_w = height - new_h, width - new_w
        top, left = (missing_h, missing_w) if sides == "left_top" else (missing_h // 2, missing_w // 2)
        flat = functional.pad(flat, (left, missing_w - left, top, missing_h - top))
    flat = flat / 255.0 if is_uint8 else flat
    return unpack(flat, leading, "* c h w")[0]


def crop_area(
    images: UInt8[Tensor, "b t c h w"] | Float[Tensor, "b t c h w"],
    area: float,
    shift: Float[Tensor, "b 2"] | None = None,
) -> Float[Tensor, "b t c h w"]:
    """The part of each picture with this share of its area, brought back to its size; floats in [0, 1].

    `shift` in [-1, 1] moves the part as far as it goes, right and down; None is the middle. Bilinear between
    the corners' pixels, as TensorFlow's crop_and_resize.
    """
    if not 0.0 < area <= 1.0:
        raise ValueError(f"area must be above 0 and at most 1, found {area}")
    b, t = images.shape[:2]
    side = area**0.5
    flat = images.flatten(0, 1)
    flat = flat.float() if images.is_floating_point() else flat.float() / 255.0
    theta = flat.new_zeros(b, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    if shift is not None:
        theta[:, :, 2] = (1.0 - side) * shift.to(theta)
    grid = functional.affine_grid(theta.repeat_interleave(t, dim=0), list(flat.shape), align_corners=True)
    cropped = functional.grid_sample(flat, grid, mode="bilinear", align_corners=True, padding_mode="border")
    return cropped.clamp(0.0, 1.0).unflatten(0, (b, t))
