"""Octo's diffusion head (Octo Model Team 2024 and its published code): each fact a test of its name."""

import numpy as np
import torch

from librobot.heads.octo_ddpm import OctoDDPM


def test_beta_schedule_is_the_definition():
    """20 levels; abar_i = f(i+1)/f(0), f(t) = cos((t/20 + s)/(1 + s) pi/2)^2, s = .008, beta at most .999."""
    head = OctoDDPM(num_train_steps=20, num_steps=20, sampler="ancestral")
    f = np.cos((np.linspace(0, 20, 21) / 20 + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.clip(1 - f[1:] / f[:-1], 0, 0.999)
    np.testing.assert_allclose(head.alphas_bar.numpy(), np.cumprod(1 - betas), rtol=1e-6)
    assert betas[-1] == 0.999


def head_of(horizon: int = 2, action_dim: int = 3) -> OctoDDPM:
    head = OctoDDPM(num_train_steps=20, num_steps=20, sampler="ancestral", clip=5.0)
    head.attach(horizon=horizon, action_dim=action_dim)
    return head


def test_sampling_steps_are_the_published_ones():
    """x <- clip((x - beta / sqrt(1 - abar) eps) / sqrt(1 - beta) + sqrt(beta) z), no noise in the last."""
    head = head_of()
    draw = np.random.default_rng(0)
    noise = draw.normal(size=(20, 1, 2, 3))
    abar = head.alphas_bar.double().numpy()
    betas = 1 - abar / np.concatenate(([1.0], abar[:-1]))

    x = noise[0]
    for step in range(19, -1, -1):
        epsilon = 0.3 * x + 0.01 * step
        x = (x - betas[step] / np.sqrt(1 - abar[step]) * epsilon) / np.sqrt(1 - betas[step])
        if step:
            x = x + np.sqrt(betas[step]) * noise[20 - step]
        x = np.clip(x, -5, 5)

    def denoiser(x_t, time, context):
        return 0.3 * x_t + 0.01 * (20 * time[:, None, None] - 1)

    sampled = head.sample(denoiser, None, (1, 2, 3), noise=torch.from_numpy(noise).float())
    np.testing.assert_allclose(sampled.numpy(), x, rtol=1e-4, atol=1e-4)


def test_x_stays_within_five():
    head, seen = head_of(), []

    def denoiser(x_t, time, context):
        seen.append(x_t.abs().max())
        return -10 * torch.ones_like(x_t)

    sampled = head.sample(denoiser, None, (1, 2, 3), noise=torch.zeros(1, 2, 3))
    assert sampled.abs().max() == 5.0
    assert max(seen) <= 5.0


def test_actions_are_clipped_before_they_are_noised_and_the_loss_is_a_sum_over_dimensions():
    head = head_of()
    actions = torch.tensor([[[9.0, 1.0, -9.0], [0.0, 0.0, 0.0]]])
    noise, mask = torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)
    time = torch.tensor([0.5])
    signal = head.alphas_bar[9].sqrt()
    seen = []

    def denoiser(x_t, time, context):
        seen.append(x_t)
        return torch.ones_like(x_t)

    loss = head.loss(denoiser, None, actions, mask, noise=noise, time=time)
    torch.testing.assert_close(seen[0][0, 0], signal * torch.tensor([5.0, 1.0, -5.0]))
    torch.testing.assert_close(loss, torch.tensor([3.0]))  # the error of each is 1, and there are three
