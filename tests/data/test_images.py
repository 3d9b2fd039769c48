"""Encoded pictures become the pixels that Pillow gives, however they are decoded."""

import io

import numpy as np
import pytest
from PIL import Image

from librobot.data.images import decode_image, encode_jpeg


def picture(height=45, width=38):
    """Smooth, with edges and noise."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 7), np.cos(y / 5), np.sin((x + y) / 11)], axis=2) * 90 + 128
    waves[10:20, 5:25] = (250, 20, 60)
    return (waves + generator.normal(0, 4, waves.shape)).clip(0, 255).astype(np.uint8)


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}])
@pytest.mark.parametrize("quality", [40, 95])
def test_a_jpeg_is_what_pillow_makes_of_it(mode, options, quality):
    data = encoded(Image.fromarray(picture()).convert(mode), format="JPEG", quality=quality, **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_image(data), expected)
    assert np.array_equal(decode_image(data + b"\0" * 5), expected)  # padded, as some writers do


@pytest.mark.parametrize("lacking", [1, 100])  # the end mark, and more
def test_a_jpeg_that_was_cut_short_is_an_error(lacking):
    with pytest.raises(ValueError, match="truncated"):
        decode_image(encode_jpeg(picture(), 95)[:-lacking])
    with pytest.raises(ValueError, match="cannot identify image file"):
        decode_image(b"no picture")
