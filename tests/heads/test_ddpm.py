"""Diffusion against closed forms."""

import math

import pytest
import torch

from librobot.heads import diffusion_solvers as solvers
from librobot.heads.ddpm import DDPM

MEAN = torch.tensor([0.8, -0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.6, 0.35], [0.35, 0.4]], dtype=torch.float64)


def exact(head: DDPM, mean: float, std: float):
    """The best denoiser for actions drawn from N(mean, std)."""

    def denoiser(x_t, time, context):
        abar = head.alphas_bar.to(x_t)[(time * head.num_train_steps).round().long() - 1][:, None, None]
        signal, sigma = abar.sqrt(), (1 - abar).sqrt()
        gain = signal * std**2 / (abar * std**2 + sigma**2)
        clean = mean + gain * (x_t - signal * mean)
        noise = (x_t - signal * clean) / sigma
        return {"sample": clean, "epsilon": noise, "v": signal * noise - sigma * clean}[head.prediction]

    return denoiser


def exact_correlated(head: DDPM):
    """The best `sample` denoiser for actions drawn from N(MEAN, COVARIANCE), in float64."""

    def denoiser(x_t, time, context):
        level = head.train_levels[round(time[0].item() * head.num_train_steps) - 1]
        total = level.alpha**2 * COVARIANCE + level.sigma**2 * torch.eye(2, dtype=torch.float64)
        gain = level.alpha * COVARIANCE @ torch.linalg.inv(total)
        return MEAN + (x_t.double() - level.alpha * MEAN) @ gain.T

    return denoiser


def exact_flow(noise, level: solvers.Level):
    """Where the probability-flow equation takes x = noise from that level to clean actions: each principal
    component keeps its number of standard deviations, sqrt(alpha^2 S + sigma^2)."""
    variances, axes = torch.linalg.eigh(COVARIANCE)
    scale = variances.sqrt() / (level.alpha**2 * variances + level.sigma**2).sqrt()
    return MEAN + (noise.double() - level.alpha * MEAN) @ axes * scale @ axes.T


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
def test_training_target(prediction):
    head = DDPM(prediction=prediction)
    actions, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    index = torch.tensor([9, 70])
    abar = head.alphas_bar[index][:, None, None]
    target = {
        "epsilon": noise,
        "sample": actions,
        "v": abar.sqrt() * noise - (1 - abar).sqrt() * actions,
    }[prediction]
    seen = {}

    def denoiser(x_t, time, context):
        seen.update(x_t=x_t, time=time)
        return target

    mask = torch.ones(2, 3, dtype=torch.bool)
    loss = head.loss(denoiser, None, actions, mask, noise=noise, time=(index + 1) / 100)
    assert torch.equal(loss, torch.zeros(2))
    torch.testing.assert_close(seen["x_t"], abar.sqrt() * actions + (1 - abar).sqrt() * noise)
    torch.testing.assert_close(seen["time"], torch.tensor([0.1, 0.71]))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "dpm_solver++"])
def test_a_point_mass_is_hit(prediction, sampler):
    head = DDPM(prediction=prediction, sampler=sampler)
    drawn = head.sample(exact(head, 1.5, 0.0), None, (64, 2, 2))
    torch.testing.assert_close(drawn, torch.full((64, 2, 2), 1.5), atol=1e-3, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "dpm_solver++"])
def test_a_gaussian_is_drawn(sampler):
    torch.manual_seed(0)
    head = DDPM(sampler=sampler, num_train_steps=500, num_steps=500)
    drawn = head.sample(exact(head, 1.0, 0.5), None, (4000, 1, 1))
    assert abs(drawn.mean() - 1.0) < 0.03
    assert abs(drawn.std() - 0.5) < 0.03


SETTINGS = [{"sampler": "ancestral"}, {"eta": 0.5}, {"sampler": "ddim"}, {"sampler": "dpm_solver++"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("schedule", ["squared_cosine", "linear", "sigmoid"])
def test_a_correlated_gaussian_is_drawn(settings, schedule):
    """10,000 samples know this mean to 0.008 and this covariance to 0.009: the bounds are five times that. In
    100 steps the ancestral sampler's covariance is about 0.05 too small (it falls with the steps)."""
    torch.manual_seed(0)
    head = DDPM(num_train_steps=400, num_steps=100, schedule=schedule, prediction="sample", **settings)
    drawn = head.sample(exact_correlated(head), None, (10_000, 1, 2))[:, 0]
    assert (drawn.mean(0) - MEAN).abs().max() < 0.04
    assert (drawn.T.cov() - COVARIANCE).abs().max() < (0.1 if head.sampler == "ancestral" else 0.06)


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm_solver++", 2)])
def test_the_error_falls_with_the_order(sampler, order):
    """Over whole runs, with `linspace`, whose last step onto clean actions starts at the cleanest level. That
    of `trailing` is as long as any and of first order, so that its error adds to, or cancels, the solver's;
    `test_edm.py` has the steps by themselves."""
    head = DDPM(num_train_steps=1024, prediction="sample", sampler=sampler, spacing="linspace", clip=None)
    noise = torch.randn(256, 1, 2, generator=torch.Generator().manual_seed(0))
    expected = exact_flow(noise, head.train_levels[-1])
    errors = []
    for num_steps in (32, 64):
        drawn = head.sample(exact_correlated(head), None, noise.shape, noise=noise, num_steps=num_steps)
        errors.append((drawn - expected).square().mean().sqrt().item())
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.25, errors


@pytest.mark.parametrize("index", [1, 40, 99])
def test_ancestral_step_is_the_posterior(index):
    """Ho et al. 2020, equations 6 and 7, between neighbouring levels."""
    head = DDPM()
    x_t, clean, fresh = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    here, there = head.train_levels[index], head.train_levels[index - 1]
    abar, before = here.alpha**2, there.alpha**2
    beta = 1 - abar / before
    mean = before**0.5 * beta / (1 - abar) * clean + (1 - beta) ** 0.5 * (1 - before) / (1 - abar) * x_t
    variance = (1 - before) / (1 - abar) * beta
    torch.testing.assert_close(
        solvers.step(x_t, clean, here, there, fresh=fresh), mean + variance**0.5 * fresh
    )


def test_ancestral_is_ddim_with_eta_1():
    noise = torch.randn(10, 3, 2, 2)
    drawn = [
        head.sample(exact(head, 0.3, 1.0), None, (3, 2, 2), noise=noise)
        for head in (DDPM(sampler="ancestral"), DDPM(eta=1.0))
    ]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "dpm_solver++"])
@pytest.mark.parametrize("prediction", ["sample", "v"])
def test_sampling_from_noise_alone(sampler, prediction):
    """With zero terminal SNR the first estimate is the mean whatever x is, and nothing divides by zero."""
    head = DDPM(zero_terminal_snr=True, sampler=sampler, prediction=prediction, clip=None)
    assert head.train_levels[-1].alpha == 0
    drawn = head.sample(exact(head, 1.5, 0.0), None, (64, 2, 2))
    torch.testing.assert_close(drawn, torch.full((64, 2, 2), 1.5), atol=1e-3, rtol=0)


def test_ancestral_sampling_with_given_noise_is_deterministic():
    head = DDPM(sampler="ancestral", num_steps=5)
    noise = torch.randn(5, 3, 2, 2)
    denoiser = exact(head, 0.3, 1.0)
    first = head.sample(denoiser, None, (3, 2, 2), noise=noise)
    assert torch.equal(head.sample(denoiser, None, (3, 2, 2), noise=noise), first)
    changed = noise.clone()
    changed[2] += 1
    assert not torch.equal(head.sample(denoiser, None, (3, 2, 2), noise=changed), first)


def test_clip_bounds_the_estimate():
    head = DDPM(prediction="sample", clip=0.5)
    drawn = head.sample(lambda x, t, c: torch.full_like(x, 3.0), None, (2, 2, 2))
    torch.testing.assert_close(drawn, torch.full((2, 2, 2), 0.5))


def test_sampling_starts_at_the_noisiest():
    head = DDPM(num_train_steps=100)
    assert [level.time for level in head.levels(4)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert len(head.levels(100)) == 101


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_karras_spacing(prediction):
    """Equal steps of sigma^(1/7) between the ends of the trained levels."""
    head = DDPM(spacing="karras", sampler="dpm_solver++", prediction=prediction)
    levels = head.levels(8)[:-1]
    roots = torch.tensor([(level.sigma / level.alpha) ** (1 / 7) for level in levels])
    torch.testing.assert_close(roots.diff(), ((roots[-1] - roots[0]) / 7).expand(7))
    assert levels[0].time == pytest.approx(1.0)
    assert levels[-1].time == pytest.approx(0.01)


def test_every_training_level_is_named_by_its_time():
    head = DDPM(num_train_steps=1000, prediction="sample")
    actions, time = torch.zeros(1000, 1, 1), torch.arange(1, 1001) / 1000
    seen = {}

    def denoiser(x_t, t, context):
        seen.update(x_t=x_t, t=t)
        return x_t

    mask = torch.ones(1000, 1, dtype=torch.bool)
    head.loss(denoiser, None, actions, mask, noise=torch.ones_like(actions), time=time)
    torch.testing.assert_close(seen["t"], time)
    torch.testing.assert_close(seen["x_t"][:, 0, 0], (1 - head.alphas_bar).sqrt())


def test_dimension_weights():
    head = DDPM(prediction="sample", dim_weights=[1.0, 3.0])
    actions = torch.tensor([1.0, 2.0]).expand(2, 3, 2)
    loss = head.loss(lambda x, t, c: torch.zeros_like(x), None, actions, torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(loss, torch.full((2,), (1 * 1.0 + 3 * 4.0) / 4))


class Words:
    """A context that can be hidden."""

    def __init__(self, values):
        self.values = values

    def dropped(self, rows):
        return Words(self.values.masked_fill(rows, 0.0))


def test_contexts_are_dropped_in_training():
    head = DDPM(drop_context=0.3)
    torch.manual_seed(0)
    shares = []

    def denoiser(x_t, time, context):
        shares.append((context.values == 0).float().mean())
        return x_t

    mask = torch.ones(5000, 1, dtype=torch.bool)
    head.loss(denoiser, Words(torch.ones(5000)), torch.zeros(5000, 1, 1), mask)
    assert abs(shares[0] - 0.3) < 0.03


def test_guidance_extrapolates():
    head = DDPM(drop_context=0.2)
    noise = torch.randn(4, 2, 2)

    def denoiser(x_t, time, context):
        return 0.5 * torch.tanh(x_t) + context.values[:, None, None]

    drawn = head.sample(denoiser, Words(torch.ones(4)), (4, 2, 2), noise=noise, guidance=1.5)
    expected = head.sample(denoiser, Words(torch.full((4,), 1.5)), (4, 2, 2), noise=noise)
    torch.testing.assert_close(drawn, expected)


def test_the_schedule_stays_exact_in_half_precision():
    head = DDPM()
    before = head.alphas_bar.clone()
    head.to(torch.bfloat16)
    assert torch.equal(head.alphas_bar, before)
    assert head.anchor.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "bad",
    [
        {"prediction": "noise"},
        {"sampler": "euler"},
        {"schedule": "cosine"},
        {"spacing": "even"},
        {"num_steps": 0},
        {"num_steps": 101},
        {"eta": 1.5},
        {"eta": 0.5, "sampler": "ancestral"},
        {"prediction": "epsilon", "zero_terminal_snr": True},
        {"spacing": "karras", "zero_terminal_snr": True, "prediction": "v"},
        {"beta_end": 0.2, "schedule": "linear"},
    ],
    ids=str,
)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        DDPM(**bad)


def test_an_unknown_sampler_is_answered_with_the_options():
    with pytest.raises(ValueError, match=r"ddim, ancestral, dpm_solver\+\+, found 'euler'"):
        DDPM(sampler="euler")


def test_more_sampling_steps_than_levels():
    with pytest.raises(ValueError, match="num_steps"):
        DDPM().sample(lambda x, t, c: x, None, (1, 1, 1), num_steps=101)
