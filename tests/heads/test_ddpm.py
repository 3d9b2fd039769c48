"""Diffusion against closed forms."""

import math

import pytest
import torch

from librobot.heads.ddpm import DDPM, squared_cosine


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


def test_schedule_is_the_published_one():
    """abar(i) = cos^2((i/T + s) / (1 + s) * pi / 2) / abar(0), but for the bound on the last beta."""
    abar = squared_cosine(50)
    level = [math.cos((i / 50 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1, 50)]
    torch.testing.assert_close(abar[:-1], torch.tensor(level) / math.cos(0.008 / 1.008 * math.pi / 2) ** 2)
    torch.testing.assert_close(abar[-1], 0.001 * abar[-2])


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
@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_a_point_mass_is_hit(prediction, sampler):
    head = DDPM(prediction=prediction, sampler=sampler)
    drawn = head.sample(exact(head, 1.5, 0.0), None, (64, 2, 2))
    torch.testing.assert_close(drawn, torch.full((64, 2, 2), 1.5), atol=1e-3, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_a_gaussian_is_drawn(sampler):
    torch.manual_seed(0)
    head = DDPM(sampler=sampler, num_train_steps=500, steps=500)
    drawn = head.sample(exact(head, 1.0, 0.5), None, (4000, 1, 1))
    assert abs(drawn.mean() - 1.0) < 0.03
    assert abs(drawn.std() - 0.5) < 0.03


def test_ancestral_step_is_the_posterior():
    """Ho et al. 2020, equations 6 and 7, between neighbouring levels."""
    head = DDPM(prediction="sample", sampler="ancestral", clip=None)
    x_t, clean, fresh = torch.randn(3, 1, 2, 2)
    index = 40
    abar, before = head.alphas_bar[index], head.alphas_bar[index - 1]
    beta = 1 - abar / before
    mean = before.sqrt() * beta / (1 - abar) * clean + (1 - beta).sqrt() * (1 - before) / (1 - abar) * x_t
    variance = (1 - before) / (1 - abar) * beta
    torch.testing.assert_close(
        head.step(x_t, clean, index, index - 1, fresh), mean + variance.sqrt() * fresh, atol=1e-5, rtol=1e-4
    )


def test_ancestral_sampling_with_given_noise_is_deterministic():
    head = DDPM(sampler="ancestral", steps=5)
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


def test_timesteps_start_at_the_noisiest():
    head = DDPM(num_train_steps=100)
    assert head.timesteps(4) == [99, 74, 49, 24]
    assert head.timesteps(100) == list(range(99, -1, -1))


def test_the_schedule_stays_exact_in_half_precision():
    head = DDPM()
    before = head.alphas_bar.clone()
    head.to(torch.bfloat16)
    assert torch.equal(head.alphas_bar, before)
    assert head.anchor.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "bad", [{"prediction": "noise"}, {"sampler": "euler"}, {"steps": 0}, {"steps": 101}], ids=str
)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        DDPM(**bad)
