"""What a user may hand to a backbone, and the errors for all else."""

from __future__ import annotations

import torch
from torch import Tensor

from librobot.errors import LibrobotError, nearest


def check_picture(name: str, image: Tensor, *, keep_floats: bool = False) -> Tensor:
    """Pictures as uint8 (b, t, 3, h, w); LibrobotError where they are neither that nor floats in [0, 1],
    which `keep_floats` leaves as they are."""
    if image.ndim != 5 or image.shape[2] != 3 or 0 in image.shape:
        raise LibrobotError(
            f"camera {name!r}: pictures must have shape (b, t, 3, h, w) with three channels and at least one "
            f"pixel, found {tuple(image.shape)}; repeat a grey channel three times"
        )
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise LibrobotError(f"camera {name!r}: pictures are uint8 in [0, 255], found {image.dtype}")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0.0 and high <= 1.0):
        raise LibrobotError(
            f"camera {name!r}: float pictures must lie in [0, 1], found {low:.3g} to {high:.3g}; give uint8 "
            f"in [0, 255], or divide"
        )
    return image if keep_floats else as_uint8(image)


def as_uint8(image: Tensor) -> Tensor:
    """Floats in [0, 1] as uint8 in [0, 255]; uint8 as it is."""
    return image if image.dtype == torch.uint8 else (image * 255.0).round().to(torch.uint8)


def check_attention(implementation: str) -> None:
    """Raise where an attention implementation is unknown, or what it needs is not there."""
    known = ("eager", "sdpa", "flash_attention_2", "flex_attention")
    if implementation not in known:
        raise ValueError(f"attn_implementation {implementation!r}: {nearest(implementation, known)}")
    if implementation == "flash_attention_2":
        from transformers.utils import is_flash_attn_2_available

        if not is_flash_attn_2_available():
            raise LibrobotError(
                "vlm.attn_implementation=flash_attention_2 needs a CUDA device and the flash-attn package: "
                "pip install flash-attn --no-build-isolation, or take vlm.attn_implementation=sdpa"
            )
