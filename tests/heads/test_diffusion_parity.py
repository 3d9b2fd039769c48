"""Whole sampling runs and schedules beside diffusers' schedulers: same schedule, noise and denoiser.

The denoiser is a fixed nonlinear function of x and time. diffusers' networks take the index of the level, or
EDM's c_noise, where ours take the time in [0, 1].
"""

import math

import diffusers
import pytest
import torch

from librobot.heads import noise_schedules
from librobot.heads.ddpm import DDPM
from librobot.heads.edm import EDM

SHAPE = (3, 4, 2)
TRAIN = 200
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
MIX = torch.tensor([[0.8, -0.5], [0.3, 0.9]])
# Predicting epsilon, an estimate divides by sqrt(abar): 6e-3 at the end of the published linear schedule and
# 5e-4 of the cosine one, which amplifies float32's rounding of 6e-8 to 1e-5 and 1e-4 in either library. A
# smaller last beta leaves 0.3, so that formulas are compared, not rounding; v and sample don't divide.
BETA_END = {"epsilon": 0.005, "v": 0.02, "sample": 0.02}
NAMES = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}


def denoiser(x, time, context):
    return torch.tanh(x @ MIX + torch.sin(3 * time)[:, None, None]) + 0.3 * x


def heads(prediction, **options):
    """Our head, and the options that make one of diffusers' schedulers the same."""
    end = BETA_END[prediction]
    common = {"num_train_steps": TRAIN, "schedule": "linear", "beta_end": end, "prediction": prediction}
    return DDPM(clip=None, **common, **options), {
        "num_train_timesteps": TRAIN,
        "beta_schedule": "linear",
        "beta_start": 1e-4 * 1000 / TRAIN,
        "beta_end": end * 1000 / TRAIN,
        "prediction_type": NAMES[prediction],
    }


def run(scheduler, noise, **options):
    x = noise
    for t in scheduler.timesteps:
        time = torch.full((len(x),), (float(t) + 1) / TRAIN)
        x = scheduler.step(denoiser(x, time, None), t, x, **options).prev_sample
    return x


PREDICTIONS = pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
SPACINGS = pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])


def published(**options):
    return diffusers.DDPMScheduler(**options).alphas_cumprod.double()


@pytest.mark.parametrize("levels", [50, 100, 1000])
def test_schedules(levels):
    """diffusers accumulates in float32: 1000 factors, each rounded to 6e-8."""
    close = {"atol": 1e-6, "rtol": 1e-4}
    scaled = {"beta_start": 0.1 / levels, "beta_end": 20 / levels, "num_train_timesteps": levels}
    cosine = published(num_train_timesteps=levels, beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(noise_schedules.squared_cosine(levels), cosine, **close)
    linear = published(beta_schedule="linear", **scaled)
    torch.testing.assert_close(noise_schedules.linear(levels), linear, **close)
    sigmoid = published(beta_schedule="sigmoid", **scaled)
    torch.testing.assert_close(noise_schedules.sigmoid(levels), sigmoid, **close)
    rescaled = published(beta_schedule="linear", rescale_betas_zero_snr=True, **scaled)
    torch.testing.assert_close(
        noise_schedules.zero_terminal_snr(noise_schedules.linear(levels)), rescaled, **close
    )


@pytest.mark.parametrize("levels", [100, 1000])
@pytest.mark.parametrize("steps", [1, 4, 10, 25, 50])
@SPACINGS
def test_spacings(levels, steps, spacing):
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=levels, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert noise_schedules.spaced_indices(levels, steps, spacing) == scheduler.timesteps.tolist()


@PREDICTIONS
@SPACINGS
def test_ancestral(prediction, spacing):
    head, options = heads(prediction, sampler="ancestral", spacing=spacing)
    scheduler = diffusers.DDPMScheduler(clip_sample=False, timestep_spacing=spacing, **options)
    scheduler.set_timesteps(20)
    # diffusers draws what each step adds from a generator: this one, after x at t = 1.
    draw = torch.Generator().manual_seed(3)
    noise = torch.stack([torch.randn(SHAPE, generator=draw) for _ in range(20)])
    draw.manual_seed(3)
    expected = run(scheduler, torch.randn(SHAPE, generator=draw), generator=draw)
    torch.testing.assert_close(
        head.sample(denoiser, None, SHAPE, noise=noise, num_steps=20), expected, **TOLERANCE
    )


@PREDICTIONS
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim(prediction, spacing, eta):
    """Without linspace, for which diffusers' DDIM steps to levels that it then does not visit."""
    head, options = heads(prediction, spacing=spacing, eta=eta)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing=spacing, **options)
    scheduler.set_timesteps(20)
    noise = torch.randn(20, *SHAPE, generator=torch.Generator().manual_seed(3))
    x = noise[0]
    for i, t in enumerate(scheduler.timesteps):
        output = denoiser(x, torch.full((3,), (float(t) + 1) / TRAIN), None)
        fresh = noise[i + 1] if i < 19 else torch.zeros(SHAPE)
        x = scheduler.step(output, t, x, eta=eta, variance_noise=fresh if eta else None).prev_sample
    given = noise if eta else noise[0]
    torch.testing.assert_close(head.sample(denoiser, None, SHAPE, noise=given, num_steps=20), x, **TOLERANCE)


@PREDICTIONS
def test_ddim_with_clipping(prediction):
    """On the published cosine schedule: estimates that rounding would spoil are beyond the bound anyway."""
    head = DDPM(prediction=prediction, clip=1.0)
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=100,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=NAMES[prediction],
        timestep_spacing="trailing",
        clip_sample=True,
    )
    scheduler.set_timesteps(10)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    x = noise
    for t in scheduler.timesteps:
        output = denoiser(x, torch.full((3,), (float(t) + 1) / 100), None)
        x = scheduler.step(output, t, x, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(head.sample(denoiser, None, SHAPE, noise=noise), x, **TOLERANCE)


@PREDICTIONS
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "karras"])
@pytest.mark.parametrize("steps", [5, 20])
def test_dpm_solver(prediction, spacing, steps):
    """diffusers' multistep scheduler has spacings of its own, so it is given ours, but for `karras`. There it
    rounds the times that the network sees, so the network is given ours, and the levels are compared."""
    head, options = heads(prediction, sampler="dpm_solver++", spacing=spacing)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        use_karras_sigmas=spacing == "karras",
        lower_order_final=True,
        **options,
    )
    if spacing == "karras":
        scheduler.set_timesteps(steps)
        levels = head.levels(steps)[:-1]
        sigmas = torch.tensor([level.sigma / level.alpha for level in levels])
        torch.testing.assert_close(sigmas, scheduler.sigmas[:-1], rtol=1e-4, atol=0)
        x = noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
        for level, t in zip(levels, scheduler.timesteps, strict=True):
            assert abs(level.time * TRAIN - 1 - float(t)) < 0.51
            x = scheduler.step(denoiser(x, torch.full((3,), level.time), None), t, x).prev_sample
    else:
        indices = noise_schedules.spaced_indices(TRAIN, steps, spacing)
        scheduler.set_timesteps(timesteps=indices)
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
        x = run(scheduler, noise)
    torch.testing.assert_close(
        head.sample(denoiser, None, SHAPE, noise=noise, num_steps=steps), x, **TOLERANCE
    )


@pytest.mark.parametrize("prediction", ["v", "sample"])
def test_zero_terminal_snr(prediction):
    """DDIM from noise alone."""
    head, options = heads(prediction, zero_terminal_snr=True)
    scheduler = diffusers.DDIMScheduler(
        clip_sample=False, timestep_spacing="trailing", rescale_betas_zero_snr=True, **options
    )
    scheduler.set_timesteps(20)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    x = run(scheduler, noise)
    torch.testing.assert_close(head.sample(denoiser, None, SHAPE, noise=noise, num_steps=20), x, **TOLERANCE)


EDM_OPTIONS = {"sigma_data": 0.5, "sigma_min": 0.01, "sigma_max": 20.0}


def run_edm(scheduler, noise, steps):
    """diffusers passes c_noise = ln(sigma) / 4 to the network, and scales its input by c_in."""
    scheduler.set_timesteps(steps)
    x = EDM_OPTIONS["sigma_max"] * noise
    low, high = math.log(EDM_OPTIONS["sigma_min"]), math.log(EDM_OPTIONS["sigma_max"])
    for t in scheduler.timesteps:
        time = torch.full((len(x),), (4 * float(t) - low) / (high - low))
        x = scheduler.step(denoiser(scheduler.scale_model_input(x, t), time, None), t, x).prev_sample
    return x


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("sampler", ["euler", "dpm_solver++"])
def test_edm(sampler, steps):
    head = EDM(sampler=sampler, **EDM_OPTIONS)
    kind = diffusers.EDMEulerScheduler if sampler == "euler" else diffusers.EDMDPMSolverMultistepScheduler
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    expected = run_edm(kind(**EDM_OPTIONS), noise, steps)
    torch.testing.assert_close(
        head.sample(denoiser, None, SHAPE, noise=noise, num_steps=steps), expected, **TOLERANCE
    )


@pytest.mark.parametrize("steps", [5, 20])
def test_edm_heun(steps):
    """diffusers' Heun scheduler knows no preconditioning: it is given EDM's levels and estimates."""
    head = EDM(sampler="heun", **EDM_OPTIONS)
    levels = head.levels(steps)
    scheduler = diffusers.HeunDiscreteScheduler(prediction_type="sample")
    scheduler.set_timesteps(steps)
    sigmas = torch.tensor([level.sigma for level in levels])
    scheduler.sigmas = torch.cat((sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]))
    visited = [levels[0], *(level for level in levels[1:-1] for _ in range(2))]
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    x = EDM_OPTIONS["sigma_max"] * noise
    for level, t in zip(visited, scheduler.timesteps, strict=True):
        x = scheduler.step(head.estimate(denoiser, None, x, level), t, x).prev_sample
    torch.testing.assert_close(
        head.sample(denoiser, None, SHAPE, noise=noise, num_steps=steps), x, **TOLERANCE
    )
