"""The mixture against torch.distributions, and what it learns."""

import math

import pytest
import torch
from torch import distributions as D

from librobot.heads.mixture import GaussianMixture, low_digits


def attached(k: int, a: int, **options) -> GaussianMixture:
    head = GaussianMixture(**options)
    head.attach(horizon=k, action_dim=a)
    return head


def constant(output):
    return lambda x_t, time, context: output


def output_of(weights, means, stds, min_std=0.01):
    """The network's numbers for given (b, k, m), (b, k, m, a), (b, k, m, a)."""
    scale = (stds - min_std).expm1().log()
    return torch.cat((weights.log()[..., None], means, scale), dim=-1).flatten(2)


def reference(head, output):
    """The same mixture as torch builds it: of flattened chunks, or of each step."""
    b, k, _ = output.shape
    a = head.action_dim
    modes = output.double().view(b, k, head.num_modes, 1 + 2 * a)
    logits, mean = modes[..., 0], modes[..., 1 : 1 + a]
    std = torch.nn.functional.softplus(modes[..., 1 + a :]) + head.min_std
    if head.joint == "chunk":
        logits = logits.mean(1)
        mean, std = (x.transpose(1, 2).flatten(2) for x in (mean, std))
    return D.MixtureSameFamily(D.Categorical(logits=logits), D.Independent(D.Normal(mean, std), 1))


@pytest.mark.parametrize("joint", ["chunk", "step"])
def test_the_likelihood_is_torchs(joint):
    torch.manual_seed(0)
    head = attached(3, 2, num_modes=4, joint=joint)
    output, actions = torch.randn(5, 3, head.output_width), torch.randn(5, 3, 2)
    mask = torch.ones(5, 3, dtype=torch.bool)
    mixture = reference(head, output)
    value = actions.double()
    expected = mixture.log_prob(value.flatten(1)) if joint == "chunk" else mixture.log_prob(value).sum(1)
    found = head.log_likelihood(constant(output), None, actions, mask)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head.loss(constant(output), None, actions, mask), -found / 6)


@pytest.mark.parametrize("joint", ["chunk", "step"])
def test_hidden_elements_are_integrated_out(joint):
    """exp(log-likelihood) of the visible is the integral of the full density over the hidden element."""
    torch.manual_seed(0)
    head = attached(2, 2, num_modes=3, joint=joint)
    output, actions = torch.randn(1, 2, head.output_width), torch.randn(1, 2, 2)
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    grid = torch.linspace(-20, 20, 20_001)
    filled = actions.repeat(len(grid), 1, 1)
    filled[:, 1, 0] = grid
    outputs = output.expand(len(grid), -1, -1)
    full = head.log_likelihood(constant(outputs), None, filled, mask.expand(len(grid), -1, -1))
    integral = torch.trapezoid(full.double().exp(), grid.double())
    mask[0, 1, 0] = False
    visible = head.log_likelihood(constant(output), None, actions, mask)
    torch.testing.assert_close(visible.double().exp()[0], integral, rtol=1e-4, atol=0)


@pytest.mark.parametrize("joint", ["chunk", "step"])
@pytest.mark.parametrize("hidden", [1e6, float("nan")])
def test_what_the_mask_hides_changes_nothing(joint, hidden):
    head = attached(3, 2, num_modes=2, joint=joint)
    output = torch.randn(2, 3, head.output_width, requires_grad=True)
    actions = torch.randn(2, 3, 2)
    mask = torch.ones(2, 3, 2, dtype=torch.bool)
    mask[0, 1:] = False
    mask[1] = False
    before = head.loss(constant(output), None, actions, mask)
    changed = head.loss(constant(output), None, actions.masked_fill(~mask, hidden), mask)
    assert torch.equal(before, changed)
    assert changed[1] == 0
    changed.sum().backward()
    assert output.grad.isfinite().all()
    assert (output.grad[1] == 0).all()
    assert (output.grad[0, 0] != 0).any()


def test_dim_weights_weight_log_densities():
    """With one mode the loss is the weighted mean of the elements' negative log densities."""
    head = attached(2, 2, num_modes=1, dim_weights=[3.0, 1.0])
    output, actions = torch.randn(4, 2, 5), torch.randn(4, 2, 2)
    normal = D.Normal(output[..., 1:3], torch.nn.functional.softplus(output[..., 3:]) + 0.01)
    expected = -(normal.log_prob(actions) * torch.tensor([3.0, 1.0])).sum((1, 2)) / 8
    mask = torch.ones(4, 2, dtype=torch.bool)
    torch.testing.assert_close(head.loss(constant(output), None, actions, mask), expected)
    plain = attached(2, 2, num_modes=1).log_likelihood(constant(output), None, actions, mask)
    torch.testing.assert_close(head.log_likelihood(constant(output), None, actions, mask), plain)


def test_the_gradient_is_the_responsibilities():
    """Of the negative log-likelihood to the logits: prior - posterior (Bishop 1994, equation 35)."""
    head = attached(1, 1, num_modes=2)
    weights = torch.tensor([[[0.3, 0.7]]])
    means, stds = torch.tensor([[[[-1.0], [1.0]]]]), torch.full((1, 1, 2, 1), 0.8)
    output = output_of(weights, means, stds).requires_grad_()
    actions = torch.tensor([[[0.2]]])
    head.loss(constant(output), None, actions, torch.ones(1, 1, dtype=torch.bool)).sum().backward()
    joint = [w * math.exp(-0.5 * ((0.2 - m) / 0.8) ** 2) for w, m in ((0.3, -1.0), (0.7, 1.0))]
    expected = torch.tensor([0.3 - joint[0] / sum(joint), 0.7 - joint[1] / sum(joint)])
    torch.testing.assert_close(output.grad[0, 0, [0, 3]], expected)


@pytest.mark.parametrize("joint", ["chunk", "step"])
def test_samples_follow_the_mixture(joint):
    """Shares of the modes, their scale, and whether a chunk's steps share a mode."""
    torch.manual_seed(0)
    head = attached(2, 1, num_modes=2, joint=joint)
    weights = torch.tensor([0.7, 0.3]).expand(20_000, 2, 2)
    means = torch.tensor([[-3.0], [3.0]]).expand(20_000, 2, 2, 1)
    stds = torch.tensor([[0.5], [0.2]]).expand(20_000, 2, 2, 1)
    drawn = head.sample(constant(output_of(weights, means, stds)), None, (20_000, 2, 1)).squeeze(-1)
    upper = drawn > 0
    assert abs(upper.float().mean() - 0.3) < 0.02
    assert abs(drawn[upper].std() - 0.2) < 0.01
    assert abs(drawn[~upper].std() - 0.5) < 0.02
    assert abs(drawn[upper].mean() - 3) < 0.02, "the Gaussian part does not depend on the mode's draw"
    together = (upper[:, 0] & upper[:, 1]).float().mean()
    assert abs(together - (0.3 if joint == "chunk" else 0.09)) < 0.02


def test_noise_temperature_and_the_best_mode():
    torch.manual_seed(0)
    weights = torch.tensor([0.2, 0.5, 0.3]).expand(8, 3, 3)
    means, stds = torch.randn(8, 3, 3, 2), torch.rand(8, 3, 3, 2) + 0.1
    denoiser, noise = constant(output_of(weights, means, stds)), torch.randn(8, 3, 2)
    draws = {
        t: attached(3, 2, num_modes=3, temperature=t).sample(denoiser, None, (8, 3, 2), noise=noise)
        for t in (0.0, 1.0, 2.0)
    }
    torch.testing.assert_close(draws[2.0] - draws[1.0], draws[1.0] - draws[0.0], atol=1e-5, rtol=1e-5)
    mode = (draws[0.0][:, None] - means.transpose(1, 2)).abs().amax((2, 3)).argmin(1)
    picked = torch.stack([stds[i, :, m] for i, m in enumerate(mode)])
    torch.testing.assert_close(draws[1.0] - draws[0.0], picked * noise, atol=1e-5, rtol=1e-4)
    best = attached(3, 2, num_modes=3, mode="best")
    assert not best.stochastic
    torch.testing.assert_close(best.sample(denoiser, None, (8, 3, 2)), means[:, :, 1])


def test_low_digits_are_uniform_and_independent():
    torch.manual_seed(0)
    noise = torch.randn(50_000)
    u = low_digits(noise)
    assert u.dtype == torch.float64
    ordered = u.sort().values
    assert (ordered - torch.linspace(0, 1, len(u), dtype=torch.float64)).abs().max() < 0.012
    for low in (0.0, 0.25, 0.5, 0.75):
        part = noise[(u >= low) & (u < low + 0.25)]
        assert abs(part.mean()) < 0.05
        assert abs(part.std() - 1) < 0.04


def test_a_network_learns_two_modes_and_their_shares():
    """Chunks are all -1 or all +1, in shares that the context tells."""
    torch.manual_seed(0)
    head = attached(2, 1, num_modes=4)
    network = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2 * 12))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)

    def denoiser(x_t, time, context):
        return network(context).view(-1, 2, 12)

    mask = torch.ones(256, 2, dtype=torch.bool)
    shares = torch.tensor([0.7, 0.2])
    for _ in range(600):
        kind = torch.randint(2, (256,))
        sign = torch.where(torch.rand(256) < shares[kind], 1.0, -1.0)
        actions = sign[:, None, None] + 0.1 * torch.randn(256, 2, 1)
        optimizer.zero_grad()
        head.loss(denoiser, kind[:, None].float(), actions, mask).mean().backward()
        optimizer.step()
        scheduler.step()
    for kind, share in enumerate(shares):
        with torch.no_grad():
            drawn = head.sample(denoiser, torch.full((4000, 1), float(kind)), (4000, 2, 1))
        assert abs((drawn[:, 0] > 0).float().mean() - share) < 0.05
        assert ((drawn.abs() - 1).abs() < 0.4).float().mean() > 0.97
        assert (drawn[:, 0].sign() == drawn[:, 1].sign()).float().mean() > 0.97


@pytest.mark.parametrize(
    "bad",
    [{"num_modes": 0}, {"joint": "both"}, {"min_std": 0.0}, {"mode": "mean"}, {"temperature": -1.0}],
    ids=str,
)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        GaussianMixture(**bad)


def test_guidance_is_refused():
    head = attached(1, 1)
    with pytest.raises(ValueError, match="guidance"):
        head.sample(constant(torch.zeros(1, 1, 15)), None, (1, 1, 1), guidance=2.0)
