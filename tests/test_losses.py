"""Losses by hand."""

import torch

from librobot import losses


def test_masked_means():
    error = torch.tensor([[[1.0, 3.0], [5.0, 7.0]], [[2.0, 2.0], [float("nan"), 9.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    torch.testing.assert_close(losses.masked_mean(error, mask), torch.tensor([4.0, 2.0]))
    elements = mask[..., None] & torch.tensor([True, False])
    torch.testing.assert_close(losses.masked_mean(error, elements), torch.tensor([3.0, 2.0]))


def test_a_hidden_nan_reaches_no_gradient():
    prediction = torch.tensor([[[1.0], [2.0]]], requires_grad=True)
    target = torch.tensor([[[0.0], [float("nan")]]])
    losses.mse(prediction, target, torch.tensor([[True, False]])).sum().backward()
    torch.testing.assert_close(prediction.grad, torch.tensor([[[2.0], [0.0]]]))


def test_kl_of_gaussians():
    mean, log_variance = torch.randn(5, 3), torch.randn(5, 3)
    ours = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(losses.gaussian_kl(mean, log_variance), expected)


def test_reductions():
    mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    error = torch.tensor([[1.0, 1.0, 1.0, 1.0], [6.0, 0.0, 0.0, 0.0]])[..., None]
    per_sample = losses.masked_mean(error, mask)
    torch.testing.assert_close(losses.reduce(per_sample, mask), torch.tensor(10 / 5))
    torch.testing.assert_close(losses.reduce(per_sample, mask, "original"), torch.tensor(10 / 8))
    assert losses.reduce(torch.zeros(2), torch.zeros(2, 4, dtype=torch.bool)) == 0
