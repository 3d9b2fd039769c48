"""The ensemble: members trained as if alone, combined, and compared."""

import pytest
import torch
from torch import nn

from librobot.heads.ddpm import DDPM
from librobot.heads.ensemble import Ensemble, spread
from librobot.heads.flow_matching import FlowMatching
from librobot.heads.mixture import GaussianMixture
from librobot.heads.regression import L1, MSE


def attached(k: int, a: int, real_dim: int | None = None, **options) -> Ensemble:
    head = Ensemble(**({"head": L1()} | options))
    head.attach(horizon=k, action_dim=a, real_dim=real_dim)
    return head


def constant(output):
    return lambda x_t, time, context: output


class Members(nn.Module):
    """Independent networks of one number, side by side."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, width)) for _ in range(count)
        )

    def forward(self, x_t, time, context):
        return torch.cat([member(context)[:, None] for member in self.members], dim=-1)


def test_the_loss_is_the_mean_of_the_members_own():
    torch.manual_seed(0)
    outputs, actions = torch.randn(3, 5, 4, 2), torch.randn(5, 4, 2)
    mask = torch.rand(5, 4) < 0.7
    calls = []

    def denoiser(x_t, time, context):
        calls.append(x_t)
        return torch.cat(list(outputs), dim=-1)

    head = attached(4, 2, num_members=3)
    assert head.output_width == 6
    found = head.loss(denoiser, None, actions, mask)
    assert len(calls) == 1
    alone = torch.stack([L1().loss(constant(output), None, actions, mask) for output in outputs])
    torch.testing.assert_close(found, alone.mean(0))


@pytest.mark.parametrize("hidden", [1e6, float("nan")])
def test_what_the_mask_hides_changes_nothing(hidden):
    head = attached(4, 2, num_members=2, head=MSE())
    output, actions = torch.randn(3, 4, 4), torch.randn(3, 4, 2)
    mask = torch.ones(3, 4, 2, dtype=torch.bool)
    mask[0, 2:] = False
    mask[1] = False
    before = head.loss(constant(output), None, actions, mask)
    assert torch.equal(head.loss(constant(output), None, actions.masked_fill(~mask, hidden), mask), before)
    assert before[1] == 0


def test_mean_member_and_disagreement():
    torch.manual_seed(0)
    outputs = torch.randn(3, 5, 4, 2)
    denoiser, shape = constant(torch.cat(list(outputs), dim=-1)), (5, 4, 2)
    mean = attached(4, 2, num_members=3)
    torch.testing.assert_close(mean.sample(denoiser, None, shape), outputs.mean(0))
    assert torch.equal(attached(4, 2, num_members=3, combine=1).sample(denoiser, None, shape), outputs[1])
    variance = ((outputs - outputs.mean(0)) ** 2).sum(0) / 2
    torch.testing.assert_close(mean.disagreement(denoiser, None, shape), variance.mean(-1).sqrt())
    padded = attached(4, 2, 1, num_members=3)
    torch.testing.assert_close(padded.disagreement(denoiser, None, shape), variance[..., 0].sqrt())


def test_spread_estimates_the_standard_deviation():
    """Of dimensions with standard deviations 1 and 2 it is the square root of 2.5; of equal chunks zero."""
    torch.manual_seed(0)
    samples = torch.randn(4000, 2, 3, 2) * torch.tensor([1.0, 2.0])
    torch.testing.assert_close(spread(samples), torch.full((2, 3), 2.5**0.5), rtol=0.06, atol=0)
    assert (spread(samples[:1].expand(5, -1, -1, -1)) == 0).all()
    with pytest.raises(ValueError, match="at least 2"):
        spread(samples[:1])


def test_bootstrap_weights_are_poisson_and_only_for_training():
    torch.manual_seed(0)
    head = attached(1, 1, num_members=2, bootstrap=True)
    denoiser = constant(torch.tensor([[[1.0, 0.0]]]).expand(20_000, 1, 2))
    actions, mask = torch.zeros(20_000, 1, 1), torch.ones(20_000, 1, dtype=torch.bool)
    weights = 2 * head.loss(denoiser, None, actions, mask)  # member 0's error is 1, member 1's is 0
    assert abs(weights.mean() - 1) < 0.05
    assert abs(weights.var() - 1) < 0.1
    assert abs((weights == 0).float().mean() - 0.3679) < 0.03
    head.eval()
    torch.testing.assert_close(head.loss(denoiser, None, actions, mask), torch.full((20_000,), 0.5))


def test_members_disagree_more_where_they_were_not_trained():
    """Five networks fitted to sin(2 x) on [-1, 1], asked there and at 2 to 3 on both sides."""
    torch.manual_seed(0)
    head = attached(1, 1, head=MSE())
    network = Members(5, head.head.output_width)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    mask = torch.ones(128, 1, dtype=torch.bool)
    for _ in range(400):
        x = torch.rand(128, 1) * 2 - 1
        optimizer.zero_grad()
        head.loss(network, x, (2 * x).sin()[:, None], mask).mean().backward()
        optimizer.step()
        scheduler.step()
    inside = torch.linspace(-1, 1, 50)[:, None]
    outside = torch.cat((torch.linspace(-3, -2, 25), torch.linspace(2, 3, 25)))[:, None]
    with torch.no_grad():
        error = head.sample(network, inside, (50, 1, 1)).squeeze(-1) - (2 * inside).sin()
        known, unknown = (head.disagreement(network, x, (50, 1, 1)) for x in (inside, outside))
    assert error.abs().max() < 0.2
    assert unknown.median() > 3 * known.median()


def test_members_with_modes():
    torch.manual_seed(0)
    best = attached(2, 1, num_members=2, head=GaussianMixture(num_modes=2, mode="best"))
    output = torch.randn(3, 2, best.output_width)
    parts = output.chunk(2, dim=-1)
    actions, mask = torch.randn(3, 2, 1), torch.ones(3, 2, dtype=torch.bool)
    expected = torch.stack([best.head.loss(constant(part), None, actions, mask) for part in parts]).mean(0)
    torch.testing.assert_close(best.loss(constant(output), None, actions, mask), expected)
    assert not best.stochastic
    drawing = attached(2, 1, num_members=2, head=GaussianMixture(num_modes=2), combine=1)
    assert drawing.stochastic
    noise = torch.randn(3, 2, 1)
    found = drawing.sample(constant(output), None, (3, 2, 1), noise=noise)
    assert torch.equal(found, drawing.head.sample(constant(parts[1]), None, (3, 2, 1), noise=noise))
    with pytest.raises(ValueError, match="combine"):
        Ensemble(head=GaussianMixture())


@pytest.mark.parametrize("inner", [DDPM, FlowMatching])
def test_heads_that_call_often_are_refused(inner):
    with pytest.raises(ValueError, match="compare samples from different noise"):
        Ensemble(head=inner())


@pytest.mark.parametrize("bad", [{"num_members": 1}, {"combine": "median"}, {"combine": 5}], ids=str)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Ensemble(head=L1(), **bad)
