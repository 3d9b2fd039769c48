"""Noise schedules against the published formulas."""

import math

import pytest
import torch

from librobot.heads import noise_schedules as schedules


def test_squared_cosine_is_the_published_one():
    """abar(i) = cos^2((i/T + s) / (1 + s) * pi / 2) / abar(0), but for the bound on the last beta."""
    abar = schedules.squared_cosine(50).float()
    level = [math.cos((i / 50 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1, 50)]
    torch.testing.assert_close(abar[:-1], torch.tensor(level) / math.cos(0.008 / 1.008 * math.pi / 2) ** 2)
    torch.testing.assert_close(abar[-1], 0.001 * abar[-2])


@pytest.mark.parametrize("schedule", [schedules.linear, schedules.sigmoid])
def test_fewer_levels_end_as_noisy(schedule):
    """log abar is about the integral of -beta, which the scaling keeps."""
    full, short = schedule(1000), schedule(200)
    torch.testing.assert_close(short[-1].log(), full[-1].log(), rtol=0.05, atol=0)
    torch.testing.assert_close(
        1 - short[0], torch.tensor(5.0) * (1 - full[0]), rtol=0.05, atol=0, check_dtype=False
    )


def test_linear_with_1000_levels_is_the_published_one():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(schedules.linear(1000), torch.exp(torch.log1p(-betas).cumsum(0)))


@pytest.mark.parametrize("schedule", [schedules.linear, schedules.sigmoid])
def test_too_few_levels_for_the_betas(schedule):
    with pytest.raises(ValueError, match="beta_end"):
        schedule(20)


@pytest.mark.parametrize("schedule", [schedules.linear, schedules.sigmoid, schedules.squared_cosine])
def test_zero_terminal_snr(schedule):
    before = schedule(100)
    after = schedules.zero_terminal_snr(before)
    assert after[-1] == 0
    torch.testing.assert_close(after[0], before[0])
    # An affine map of sqrt(abar): ratios of differences stay.
    torch.testing.assert_close(
        after.sqrt().diff() / after.sqrt().diff().sum(), before.sqrt().diff() / before.sqrt().diff().sum()
    )


def test_zero_terminal_snr_needs_two_levels():
    with pytest.raises(ValueError, match="at least 2"):
        schedules.zero_terminal_snr(torch.tensor([0.5]))


def test_karras_sigmas():
    sigmas = schedules.karras_sigmas(9, 0.002, 80.0, rho=7.0)
    torch.testing.assert_close(sigmas[[0, -1]], torch.tensor([80.0, 0.002], dtype=torch.float64))
    middle = ((80.0 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    torch.testing.assert_close(sigmas[4].item(), middle)
    assert schedules.karras_sigmas(1, 0.002, 80.0).tolist() == pytest.approx([80.0])


def test_spacing():
    """Lin et al. 2024, table 2, counted from 0."""
    assert schedules.spaced_indices(1000, 5, "trailing") == [999, 799, 599, 399, 199]
    assert schedules.spaced_indices(1000, 5, "leading") == [800, 600, 400, 200, 0]
    assert schedules.spaced_indices(1000, 5, "linspace") == [999, 749, 500, 250, 0]
    assert schedules.spaced_indices(100, 100, "trailing") == list(range(99, -1, -1))
