"""EDM against closed forms: the exact denoiser of a correlated Gaussian, and its exact flow."""

import math
from itertools import pairwise

import pytest
import torch

from librobot.heads import diffusion_solvers as solvers
from librobot.heads.diffusion_solvers import Level
from librobot.heads.edm import EDM

MEAN = torch.tensor([0.8, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.6, 0.35], [0.35, 0.4]], dtype=torch.float64)
SAMPLERS = ["euler", "heun", "dpm_solver++"]


def exact_estimate(x, alpha, sigma):
    """E[actions | x] for actions from N(MEAN, COVARIANCE) and x = alpha * actions + sigma * noise."""
    total = alpha**2 * COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64)
    gain = alpha * COVARIANCE @ torch.linalg.inv(total)
    return MEAN + (x.double() - alpha * MEAN) @ gain.T


def exact_flow(x, here: Level, there: Level):
    """Where the probability-flow equation takes x: each principal component keeps its number of standard
    deviations, sqrt(alpha^2 S + sigma^2)."""
    variances, axes = torch.linalg.eigh(COVARIANCE)
    scale_here = (here.alpha**2 * variances + here.sigma**2).sqrt()
    scale_there = (there.alpha**2 * variances + there.sigma**2).sqrt()
    components = (x.double() - here.alpha * MEAN) @ axes
    return there.alpha * MEAN + components * (scale_there / scale_here) @ axes.T


def exact(head: EDM):
    """The denoiser F whose D is exact."""

    def denoiser(x, time, context):
        sigma = head.sigma(time[:1].double()).item()
        c_skip, c_out, c_in = head.preconditioning(sigma)
        x = x.double() / c_in
        return (exact_estimate(x, 1.0, sigma) - c_skip * x) / c_out

    return denoiser


def slope(errors):
    """The order of convergence over the last halving of the step."""
    return math.log2(errors[-2] / errors[-1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_correlated_gaussian_is_drawn(sampler):
    """20,000 samples know this mean to 0.006 and this covariance to 0.006: the bounds are five times that. In
    40 steps Euler's covariance is 0.07 too small (it falls with the steps, below)."""
    torch.manual_seed(0)
    head = EDM(sampler=sampler, num_steps=40)
    drawn = head.sample(exact(head), None, (20_000, 1, 2))[:, 0]
    bound = 0.11 if sampler == "euler" else 0.04
    assert (drawn.mean(0) - MEAN).abs().max() < 0.03
    assert (drawn.T.cov() - COVARIANCE).abs().max() < bound


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("dpm_solver++", 2)])
def test_the_error_falls_with_the_order(sampler, order):
    """On the head's own grid. Its last step, from sigma_min to 0, is a hundredth of what is measured."""
    head = EDM(sampler=sampler, sigma_min=0.002, sigma_max=20.0)
    noise = torch.randn(64, 1, 2, generator=torch.Generator().manual_seed(0))
    level = head.levels(1)[0]
    expected = exact_flow(20.0 * noise, level, Level(0.0, 1.0, 0.0))
    errors = []
    for num_steps in (40, 80):
        drawn = head.sample(exact(head), None, (64, 1, 2), noise=noise, num_steps=num_steps)
        errors.append((drawn - expected).square().mean().sqrt().item())
    assert abs(slope(errors) - order) < 0.25, errors


@pytest.mark.parametrize("alpha_follows", [False, True], ids=["exploding", "preserving"])
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("dpm_solver++", 2)])
def test_the_steps_have_their_order(sampler, order, alpha_follows):
    """In float64, on a grid that is uniform in lambda and ends at little noise, so that neither rounding nor
    a last step of lower order is seen. Heun's step is for alpha = 1 alone."""
    if sampler == "heun" and alpha_follows:
        pytest.skip("Heun's step is for alpha = 1")
    x_start = torch.randn(32, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for num_steps in (40, 80, 160):
        levels = []
        for ratio in torch.logspace(0.5, -1.5, num_steps + 1, dtype=torch.float64).tolist():
            alpha = 1 / math.sqrt(1 + ratio**2) if alpha_follows else 1.0
            levels.append(Level(0.0, alpha, alpha * ratio))
        x, before = x_start, None
        for here, there in pairwise(levels):
            clean = exact_estimate(x, here.alpha, here.sigma)
            towards = clean
            if sampler == "dpm_solver++" and before is not None:
                towards = solvers.extrapolate(clean, before[1], before[0], here, there)
            stepped = solvers.step(x, towards, here, there)
            if sampler == "heun":
                clean_there = exact_estimate(stepped, there.alpha, there.sigma)
                stepped = solvers.heun_correction(x, clean, stepped, clean_there, here, there)
            x, before = stepped, (here, clean)
        errors.append((x - exact_flow(x_start, levels[0], levels[-1])).abs().max().item())
    assert abs(slope(errors) - order) < 0.1, errors


def test_the_objective_is_the_papers():
    """lambda(sigma) * |D(x) - actions|^2 with lambda = (sigma^2 + sigma_data^2) / (sigma * sigma_data)^2: the
    error of F alone."""
    head = EDM(sigma_data=0.7)
    actions, noise = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    time = torch.tensor([0.1, 0.5, 1.0])
    sigma = torch.exp(math.log(0.002) + time * math.log(80.0 / 0.002))[:, None, None]
    seen = {}

    def denoiser(x_t, t, context):
        seen.update(x_t=x_t, t=t)
        return torch.sin(2 * x_t) + t[:, None, None]

    loss = head.loss(denoiser, None, actions, torch.ones(3, 4, dtype=torch.bool), noise=noise, time=time)
    total = sigma**2 + 0.7**2
    x = actions + sigma * noise
    output = torch.sin(2 * x / total.sqrt()) + time[:, None, None]
    clean = 0.7**2 / total * x + 0.7 * sigma / total.sqrt() * output
    weighted = total / (0.7 * sigma) ** 2 * (clean - actions).square()
    # At little noise D - actions cancels: the weighted form is good to about 1e-3 in float32.
    torch.testing.assert_close(loss, weighted.mean((1, 2)), rtol=2e-3, atol=0)
    torch.testing.assert_close(seen["x_t"], x / total.sqrt())
    assert torch.equal(seen["t"], time)


def test_input_and_target_have_unit_variance():
    """What the preconditioning is for (appendix B.6), at every level."""
    torch.manual_seed(0)
    head = EDM(sigma_data=0.5)
    actions = 0.5 * torch.randn(2, 50_000, 1)
    mask = torch.ones(2, 50_000, dtype=torch.bool)
    inputs = []

    def zeros(x_t, time, context):
        inputs.append(x_t.var((1, 2)))
        return torch.zeros_like(x_t)

    for time in ([0.2, 0.4], [0.6, 1.0]):
        loss = head.loss(zeros, None, actions, mask, time=torch.tensor(time))
        torch.testing.assert_close(loss, torch.ones(2), atol=0.04, rtol=0)
    torch.testing.assert_close(torch.cat(inputs), torch.ones(4), atol=0.04, rtol=0)


def test_training_levels_are_log_normal_within_the_bounds():
    torch.manual_seed(0)
    head = EDM()
    log_sigma = head.sigma(head.draw_time(50_000)).log()
    assert abs(log_sigma.mean() + 1.2) < 0.03
    assert abs(log_sigma.std() - 1.2) < 0.03
    narrow = EDM(sigma_min=0.2, sigma_max=0.5)
    time = narrow.draw_time(1000)
    assert (time == 0).any()
    assert (time == 1).any()
    sigma = narrow.sigma(time)
    torch.testing.assert_close(torch.stack((sigma.min(), sigma.max())), torch.tensor([0.2, 0.5]))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 5])
def test_the_number_of_calls(sampler, num_steps):
    head = EDM(sampler=sampler)
    times = []

    def denoiser(x, time, context):
        times.append(time[0].item())
        return torch.zeros_like(x)

    head.sample(denoiser, None, (2, 1, 2), num_steps=num_steps)
    assert len(times) == head.num_calls(num_steps)
    assert times[0] == 1.0
    assert times[-1] == pytest.approx(0.0 if num_steps > 1 else 1.0, abs=1e-6)


class Words:
    """A context that can be hidden."""

    def __init__(self, values):
        self.values = values

    def dropped(self, rows):
        return Words(self.values.masked_fill(rows, 0.0))


def test_guidance_is_the_extrapolated_estimate():
    head = EDM(drop_context=0.2, num_steps=3)
    noise = torch.randn(4, 2, 2)

    def denoiser(x, time, context):
        return torch.tanh(x) + context.values[:, None, None]

    drawn = head.sample(denoiser, Words(torch.ones(4)), (4, 2, 2), noise=noise, guidance=2.5)
    expected = head.sample(denoiser, Words(torch.full((4,), 2.5)), (4, 2, 2), noise=noise)
    torch.testing.assert_close(drawn, expected)


def test_sampling_stays_in_float32_with_a_bfloat16_network():
    head = EDM().to(torch.bfloat16)
    drawn = head.sample(lambda x, t, c: torch.zeros_like(x, dtype=torch.bfloat16), None, (2, 1, 2))
    assert drawn.dtype == torch.float32


@pytest.mark.parametrize(
    "bad",
    [
        {"sampler": "ddim"},
        {"num_steps": 0},
        {"sigma_data": 0.0},
        {"sigma_min": 100.0},
        {"rho": 0.0},
        {"p_std": 0.0},
    ],
    ids=str,
)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        EDM(**bad)
    if "num_steps" in bad:
        with pytest.raises(ValueError, match="num_steps"):
            EDM().sample(lambda x, t, c: x, None, (1, 1, 1), **bad)
