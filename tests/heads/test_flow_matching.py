"""Flow matching against closed forms."""

import pytest
import torch

from librobot.heads.flow_matching import FlowMatching


def test_objective_is_the_straight_path():
    head = FlowMatching()
    actions, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    time = torch.tensor([0.25, 0.75])
    seen = {}

    def denoiser(x_t, t, context):
        seen.update(x_t=x_t, t=t)
        return noise - actions + 0.5

    loss = head.loss(denoiser, None, actions, torch.ones(2, 3, dtype=torch.bool), noise=noise, time=time)
    torch.testing.assert_close(loss, torch.full((2,), 0.25))
    torch.testing.assert_close(seen["x_t"][0], 0.25 * noise[0] + 0.75 * actions[0])
    assert torch.equal(seen["t"], time)


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_a_point_mass_is_hit_exactly(steps):
    point = torch.tensor([1.5, -2.0])
    noise = torch.randn(8, 3, 2)
    drawn = FlowMatching().sample(
        lambda x, t, c: (x - point) / t[:, None, None], None, (8, 3, 2), noise=noise, num_steps=steps
    )
    torch.testing.assert_close(drawn, point.expand(8, 3, 2), atol=1e-5, rtol=0)


def test_a_gaussian_is_transported():
    """For N(mean, std) the exact flow maps the noise z to mean + std * z."""
    mean, std = 2.0, 0.5

    def velocity(x, t, c):
        t = t[:, None, None]
        var = t**2 + ((1 - t) * std) ** 2
        slope = (t - (1 - t) * std**2) / var
        return -mean + slope * (x - (1 - t) * mean)

    noise = torch.randn(16, 2, 2)
    drawn = FlowMatching().sample(velocity, None, (16, 2, 2), noise=noise, num_steps=2000)
    torch.testing.assert_close(drawn, mean + std * noise, atol=5e-3, rtol=0)


def test_the_other_time_convention_is_the_papers():
    """The network sees 1 - t and is trained on actions - noise; `time` and the loss are the same."""
    actions, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    time = torch.tensor([0.25, 0.75])
    seen = {}

    def denoiser(x_t, t, context):
        seen.update(x_t=x_t, t=t)
        return actions - noise + 0.5

    head = FlowMatching(time_convention="noise_at_zero")
    loss = head.loss(denoiser, None, actions, torch.ones(2, 3, dtype=torch.bool), noise=noise, time=time)
    torch.testing.assert_close(loss, torch.full((2,), 0.25))
    torch.testing.assert_close(seen["x_t"][0], 0.25 * noise[0] + 0.75 * actions[0])
    torch.testing.assert_close(seen["t"], torch.tensor([0.75, 0.25]))


@pytest.mark.parametrize(
    ("options", "mean", "std"),
    [
        ({}, 1.5 / 2.5, 0.262),  # Beta(1.5, 1)
        ({"beta_alpha": 1.0, "beta_beta": 3.0}, 0.25, 0.194),
        ({"time_distribution": "uniform"}, 0.5, 0.289),
        ({"time_distribution": "logit_normal"}, 0.5, 0.208),
    ],
)
def test_times(options, mean, std):
    torch.manual_seed(0)
    time = FlowMatching(**options).draw_time(20_000)
    assert time.min() >= 0.001
    assert time.max() <= 1.0
    assert abs(time.mean() - mean) < 0.01
    assert abs(time.std() - std) < 0.01


def test_bad_arguments():
    with pytest.raises(ValueError, match="time_distribution"):
        FlowMatching(time_distribution="gamma")
    with pytest.raises(ValueError, match="steps"):
        FlowMatching(num_steps=0)
