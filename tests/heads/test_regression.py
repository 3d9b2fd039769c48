"""Deterministic heads."""

import torch

from librobot.heads.regression import L1, MSE


def test_zeros_in_and_the_output_compared():
    actions = torch.full((2, 3, 1), 2.0)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    prediction = torch.tensor([[0.0, 1.0, 5.0], [3.0, 9.0, 9.0]])[..., None]

    def denoiser(x_t, time, context):
        assert (x_t == 0).all()
        assert (time == 0).all()
        return prediction

    torch.testing.assert_close(L1().loss(denoiser, None, actions, mask), torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(MSE().loss(denoiser, None, actions, mask), torch.tensor([14 / 3, 1.0]))
    assert torch.equal(L1().sample(denoiser, None, (2, 3, 1)), prediction)
