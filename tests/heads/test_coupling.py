"""Optimal-transport coupling: against other solvers, and without telling the noise what the context is."""

from dataclasses import dataclass

import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from librobot.heads.coupling import optimal_partners, pair_costs
from librobot.heads.flow_matching import FlowMatching


@dataclass
class Context:
    features: torch.Tensor


def drawn(count: int = 32, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    noise, actions = (torch.randn(count, 3, 2, generator=draw) for _ in range(2))
    return noise, actions, torch.ones(count, 3, 2, dtype=torch.bool)


def test_the_plan_is_the_optimal_one():
    noise, actions, mask = drawn()
    partners = optimal_partners(noise, actions, mask, torch.zeros(32, 1), 1.0)
    assert sorted(partners.tolist()) == list(range(32)), "a permutation"
    cost = torch.cdist(actions.flatten(1).double(), noise.flatten(1).double()).square()
    torch.testing.assert_close(pair_costs(noise, actions, mask), cost)
    rows, columns = linear_sum_assignment(cost.numpy())
    found = cost[torch.arange(32), partners].sum().item()
    assert found == pytest.approx(cost.numpy()[rows, columns].sum(), rel=1e-6)
    uniform = torch.full((32,), 1 / 32, dtype=torch.float64).numpy()
    assert found / 32 == pytest.approx(ot.emd2(uniform, uniform, cost.numpy()), rel=1e-6)


def test_hidden_elements_cost_nothing():
    noise, actions, mask = drawn()
    mask[:, 2] = False
    changed = actions.clone()
    changed[:, 2] = 1e6
    partners = optimal_partners(noise, actions, mask, torch.zeros(32, 1), 1.0)
    assert torch.equal(optimal_partners(noise, changed, mask, torch.zeros(32, 1), 1.0), partners)


def biased_pairs(condition_weight: float):
    """Two contexts whose actions lie on opposite sides; the noise that each of them gets."""
    noise, actions, mask = drawn(256)
    which = torch.arange(256) % 2
    actions = 0.1 * actions + (2.0 * which - 1)[:, None, None]
    features = 3.0 * which[:, None].float()
    partners = optimal_partners(noise, actions, mask, features, condition_weight)
    return which, partners, noise[partners]


def test_noise_stays_within_its_context():
    which, partners, _ = biased_pairs(10.0)
    assert torch.equal(which[partners], which)


def test_without_the_condition_the_noise_is_biased():
    """What the condition's cost is for: a plan over actions alone gives each context its own noise."""
    for weight, biased in ((0.0, True), (10.0, False)):
        which, _, noise = biased_pairs(weight)
        gap = (noise[which == 1].mean() - noise[which == 0].mean()).item()
        assert (gap > 0.3) == biased, gap


def test_only_drawn_noise_is_coupled():
    noise, actions, mask = drawn()
    head = FlowMatching(coupling="optimal_transport")
    head.attach(horizon=3, action_dim=2)
    seen = []

    def denoiser(x_t, time, context):
        seen.append(x_t)
        return x_t

    context = Context(torch.zeros(32, 1))
    head.loss(denoiser, context, actions, mask[..., 0], noise=noise, time=torch.ones(32))
    torch.testing.assert_close(seen[0], noise)
    torch.manual_seed(0)
    coupled = head.couple(actions, mask, context)
    torch.manual_seed(0)
    plain = torch.randn_like(actions)
    assert (coupled - actions).square().sum() < (plain - actions).square().sum()
    assert set(coupled[:, 0, 0].tolist()) == set(plain[:, 0, 0].tolist())
    with pytest.raises(ValueError, match="features"):
        head.couple(actions, mask, None)
