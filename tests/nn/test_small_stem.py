"""Octo's convolutional stem (Octo Model Team 2024 and its published code): each fact a test of its name."""

import pytest
import torch

from librobot.nn.small_stem import SmallStem, StdConv


def test_patches_lie_row_by_row():
    """A bright patch in row 1, column 2 changes token 1 * 4 + 2 the most."""
    torch.manual_seed(0)
    stem = SmallStem((4, 8, 8, 16), num_groups=4, in_channels=3, width=8)
    assert (stem.patch_size, stem.num_tokens(64)) == (16, 16)
    dark = torch.zeros(1, 3, 64, 64)
    bright = dark.clone()
    bright[:, :, 9:24, 25:40] = 5.0  # a token's centre is at the patch's upper left
    change = (stem(bright) - stem(dark)).square().sum(dim=-1)[0]
    assert int(change.argmax()) == 6
    with pytest.raises(ValueError, match="multiple of 16"):
        stem.num_tokens(40)


def test_kernels_are_standardised():
    torch.manual_seed(0)
    conv = StdConv(3, 5, 3, stride=2, padding=1)
    kernel = conv.standardised().detach()
    torch.testing.assert_close(kernel.mean(dim=(1, 2, 3)), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(kernel.std(dim=(1, 2, 3), correction=0), torch.ones(5), atol=1e-3, rtol=0)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before = conv(x)
        conv.weight.mul_(3.0).add_(7.0)
    torch.testing.assert_close(conv(x), before, atol=1e-3, rtol=1e-3)
