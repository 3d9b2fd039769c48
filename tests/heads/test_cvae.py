"""The variational head against the definitions, and what it learns."""

import pytest
import torch
from torch import distributions as D

from librobot.heads.cvae import CVAE

SMALL = {"latent_dim": 3, "width": 16, "num_heads": 2, "feedforward_width": 32, "num_layers": 1}


def attached(k: int = 4, a: int = 2, **options) -> CVAE:
    torch.manual_seed(0)
    head = CVAE(**(SMALL | options))
    head.attach(horizon=k, action_dim=a)
    return head


def everything(size: int, k: int = 4) -> torch.Tensor:
    return torch.ones(size, k, dtype=torch.bool)


def test_a_perfect_reconstruction_costs_the_kl():
    head, actions = attached(kl_weight=0.7), torch.randn(5, 4, 2)
    mask = everything(5)
    mean, log_variance = head.posterior(actions, mask[..., None].expand_as(actions))
    kl = D.kl_divergence(D.Normal(mean, (0.5 * log_variance).exp()), D.Normal(0.0, 1.0)).sum(-1)
    assert kl.min() > 0.01
    torch.testing.assert_close(head.loss(lambda *_: actions, None, actions, mask), 0.7 * kl)


def test_free_bits_cost_the_same_and_pull_nothing():
    actions, mask = torch.randn(5, 4, 2), everything(5)
    head = attached(kl_weight=0.5, free_bits=100.0)
    loss = head.loss(lambda *_: actions, None, actions, mask)
    torch.testing.assert_close(loss, torch.full((5,), 50.0))
    loss.sum().backward()
    assert all((p.grad == 0).all() for p in head.posterior.parameters())


@pytest.mark.parametrize(("reconstruction", "power"), [("l1", 1), ("mse", 2)])
def test_the_error_is_weighted_by_dimension(reconstruction, power):
    head = attached(reconstruction=reconstruction, kl_weight=0.0, dim_weights=[3.0, 1.0])
    actions, prediction = torch.randn(2, 5, 4, 2)
    loss = head.loss(lambda *_: prediction, None, actions, everything(5))
    error = (prediction - actions).abs() ** power
    torch.testing.assert_close(loss, (error * torch.tensor([3.0, 1.0])).sum((1, 2)) / 16)


def test_the_latent_is_what_the_denoiser_sees():
    head, actions, noise = attached(), torch.randn(5, 4, 2), torch.randn(5, 4, 2)
    seen = []

    def denoiser(x_t, time, context):
        seen.append(x_t)
        assert (time == 0).all()
        return x_t

    mask = everything(5)
    mean, log_variance = head.posterior(actions, mask[..., None].expand_as(actions))
    head.loss(denoiser, None, actions, mask, noise=noise)
    first = noise.flatten(1)[:, :3]
    z = mean + (0.5 * log_variance).exp() * first
    torch.testing.assert_close(seen.pop(), head.latent_proj(z).view(5, 4, 2))
    head.sample(denoiser, None, (5, 4, 2), noise=noise)
    torch.testing.assert_close(seen.pop(), head.latent_proj(first).view(5, 4, 2))


def test_the_latent_at_zero_needs_no_noise():
    head = attached(latent="zero")
    assert attached().stochastic
    assert not head.stochastic
    drawn = head.sample(lambda x_t, *_: x_t, None, (5, 4, 2))
    torch.testing.assert_close(drawn, head.latent_proj.bias.view(4, 2).expand(5, 4, 2))


@pytest.mark.parametrize("hidden", [1e6, float("nan")])
def test_what_the_mask_hides_changes_nothing(hidden):
    head, actions, noise = attached(), torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    mask = torch.ones(3, 4, 2, dtype=torch.bool)
    mask[0, 2:] = False
    mask[1, :, 1] = False
    mask[2] = False
    before = head.loss(lambda x_t, *_: x_t, None, actions, mask, noise=noise)
    changed = actions.masked_fill(~mask, hidden)
    after = head.loss(lambda x_t, *_: x_t, None, changed, mask, noise=noise)
    assert torch.equal(before, after)
    assert after[2] == 0
    after.sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_hidden_steps_are_not_read_as_zeros():
    """A chunk cut short is told apart from one that goes on in the middle of the range."""
    head, actions = attached(), torch.randn(1, 4, 2)
    mask = torch.ones(1, 4, 2, dtype=torch.bool)
    mask[:, 2:] = False
    cut, _ = head.posterior(actions, mask)
    zeros, _ = head.posterior(actions.masked_fill(~mask, 0.0), torch.ones_like(mask))
    assert (cut - zeros).abs().max() > 1e-4


def test_every_parameter_has_a_gradient():
    head, actions = attached(), torch.randn(5, 4, 2)
    head.loss(lambda x_t, *_: x_t.square(), None, actions, everything(5)).sum().backward()
    without = {name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == set()


def test_prior_draws_reach_both_modes():
    """Chunks are all -1 (30 %) or all +1. The decoder is continuous in z, so some draws fall in between; one
    answer, such as a regression's, would be near neither mode (the mean is 0.4) or near one alone."""
    head = attached(2, 1, latent_dim=1, reconstruction="mse", kl_weight=0.2)
    network = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2))
    own = {"params": head.parameters(), "lr": 3e-3}
    optimizer = torch.optim.Adam([{"params": network.parameters()}, own], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)

    def denoiser(x_t, time, context):
        return network(x_t.flatten(1)).view(-1, 2, 1)

    for _ in range(300):
        sign = torch.where(torch.rand(128) < 0.7, 1.0, -1.0)
        actions = sign[:, None, None] + 0.1 * torch.randn(128, 2, 1)
        optimizer.zero_grad()
        head.loss(denoiser, None, actions, everything(128, 2)).mean().backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        drawn = head.sample(denoiser, None, (4000, 2, 1))
    assert abs((drawn[:, 0] > 0).float().mean() - 0.7) < 0.15
    assert ((drawn.abs() - 1).abs() < 0.4).float().mean() > 0.25


def test_a_latent_that_noise_cannot_fill_is_refused():
    with pytest.raises(ValueError, match="latent_dim must be at most the 1 x 2 = 2"):
        attached(1, 2)


@pytest.mark.parametrize(
    "bad",
    [
        {"latent_dim": 0},
        {"reconstruction": "l2"},
        {"latent": "mean"},
        {"kl_weight": -1.0},
        {"free_bits": -1.0},
    ],
    ids=str,
)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        CVAE(**bad)
