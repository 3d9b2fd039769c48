"""Image bytes and sizes: PNG or JPEG out and in, resizing that keeps the aspect."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from simplejpeg import decode_jpeg, decode_jpeg_header

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"
EIGHT_BIT_RGB = b"\x08\x02"
"""Bit depth and colour type, at byte 24 of a PNG."""

PNG_LEVEL = 1
"""zlib's fastest: frames of a simulator are written faster than they are drawn."""


def encode_png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Lossless PNG, row by row with the "up" filter (PNG specification, section 9), about twice as fast as a
    general encoder that tries every filter."""
    height, width, _ = image.shape
    rows = np.empty((height, 1 + width * 3), np.uint8)
    flat = image.reshape(height, width * 3)
    rows[:, 0] = 2
    rows[0, 1:] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), PNG_LEVEL)), (b"IEND", b"")
    chunks = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(name)))
        for name, body in parts
    )
    return PNG_SIGNATURE + b"".join(chunks)


def encode_jpeg(image: UInt8[np.ndarray, "h w 3"], quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return file.getvalue()


def decode_image(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """PNG, JPEG or whatever Pillow reads. Raises ValueError where it cannot.

    A plain PNG (three channels of 8 bits) goes to torchvision and a JPEG to libjpeg-turbo by simplejpeg: both
    give the same pixels as Pillow, faster, and leave Python's lock to other threads.
    """
    if data.startswith(PNG_SIGNATURE) and data[24:26] == EIGHT_BIT_RGB:
        from torchvision.io import decode_png

        try:
            decoded = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        return decoded.permute(1, 2, 0).numpy()
    if data.startswith(JPEG_SIGNATURE):
        with suppress(ValueError):  # which Pillow has a better word for
            if decode_jpeg_header(data)[2] in ("YCbCr", "RGB", "Gray"):
                return decode_jpeg(data)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(str(error)) from error


def resize_with_padding(
    image: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Scale to fit into (height, width), aspect kept, centred on black; antialiased bilinear.

    torch's resize of uint8 pictures, several times as fast as Pillow's, from which it differs by at most one
    level. A policy has to put its camera images through the same function.
    """
    source_height, source_width = image.shape[:2]
    if (source_height, source_width) == (height, width):
        return image
    inner_height, inner_width = inner_size((source_height, source_width), (height, width))
    writable = image if image.flags.writeable else image.copy()  # torch takes no other
    picture = torch.from_numpy(writable).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        picture, size=(inner_height, inner_width), mode="bilinear", antialias=True
    )[0]
    if (inner_height, inner_width) == (height, width):
        return resized.permute(1, 2, 0).numpy()
    padded = np.zeros((3, height, width), np.uint8)
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    padded[:, top : top + inner_height, left : left + inner_width] = resized.numpy()
    return padded.transpose(1, 2, 0)


def inner_size(source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """How much of (height, width) a picture of the size `source` fills, aspect kept, in the middle of
    `target`."""
    scale = min(target[0] / source[0], target[1] / source[1])
    return tuple(  # type: ignore[return-value]
        max(1, min(outer, round(side * scale))) for side, outer in zip(source, target, strict=True)
    )
