"""What every action head must hold, and what it must draw from a denoiser that knows the answer."""

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import tiny_models

HEADS = tiny_models.options("head")


@pytest.fixture(params=HEADS)
def head(request):
    torch.manual_seed(0)
    return instantiate(OmegaConf.create(tiny_models.node("head", request.param)), _convert_="all")


def mixing(x_t, time, context):
    """A denoiser whose steps and dimensions all see each other."""
    return torch.tanh(x_t.cumsum(1).flip(1).cumsum(1) @ context + time[:, None, None])


def inputs(size: int = 3):
    draw = torch.Generator().manual_seed(1)
    actions = torch.randn(size, 5, 4, generator=draw)
    noise = torch.randn(size, 5, 4, generator=draw)
    return actions, noise, torch.linspace(0.2, 0.9, size), torch.randn(4, 4, generator=draw)


def test_a_loss_per_sample_without_gradient_of_the_hidden(head):
    actions, noise, time, context = inputs()
    actions.requires_grad_()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    loss = head.loss(mixing, context, actions, mask, noise=noise, time=time)
    assert loss.shape == (3,)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert (actions.grad[1, 3:] == 0).all()
    assert (actions.grad[1, :3] != 0).any()


@pytest.mark.parametrize("hidden", [1e6, float("nan")])
def test_hidden_steps_and_dimensions_change_nothing(head, hidden):
    actions, noise, time, context = inputs()
    mask = torch.ones(3, 5, 4, dtype=torch.bool)
    mask[1, 3:] = False
    mask[2, 1] = False
    mask[:, :, 3] = False
    before = head.loss(mixing, context, actions, mask, noise=noise, time=time)
    changed = actions.masked_fill(~mask, hidden)
    assert torch.equal(head.loss(mixing, context, changed, mask, noise=noise, time=time), before)


def test_a_sample_with_nothing_to_learn_has_no_loss(head):
    actions, noise, time, context = inputs()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0] = False
    loss = head.loss(mixing, context, actions, mask, noise=noise, time=time)
    assert loss[0] == 0
    assert (loss[1:] > 0).all()


def test_samples_are_independent_and_fixed_by_noise(head):
    _, noise, _, context = inputs()
    together = head.sample(mixing, context, (3, 5, 4), noise=noise)
    torch.manual_seed(123)
    assert torch.equal(head.sample(mixing, context, (3, 5, 4), noise=noise), together)
    alone = head.sample(mixing, context, (1, 5, 4), noise=noise[1:2])
    torch.testing.assert_close(alone[0], together[1])


def test_the_number_of_steps_is_the_number_of_calls(head):
    calls = []

    def counting(x_t, time, context):
        calls.append(time.clone())
        return mixing(x_t, time, context)

    _, noise, _, context = inputs()
    head.sample(counting, context, (3, 5, 4), noise=noise, steps=3)
    assert len(calls) == (3 if head.generative else 1)
    if head.generative:
        times = torch.stack(calls)[:, 0]
        assert times[0] == 1.0, "sampling starts at pure noise"
        assert (times.diff() < 0).all()


def test_the_loss_trains_what_sampling_needs(head):
    """Fit a network that knows nothing but time to one constant chunk, and draw that chunk."""
    torch.manual_seed(0)
    target = torch.tensor([[0.7, -0.4]])
    network = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)

    def denoiser(x_t, time, context):
        return network(torch.cat((x_t, time[:, None, None].expand(-1, x_t.shape[1], 1)), dim=-1))

    actions, mask = target.expand(256, 1, 2), torch.ones(256, 1, dtype=torch.bool)
    for _ in range(300):
        optimizer.zero_grad()
        head.loss(denoiser, None, actions, mask).mean().backward()
        optimizer.step()
    with torch.no_grad():
        drawn = head.sample(denoiser, None, (64, 1, 2))
    assert (drawn.mean(0) - target).abs().max() < 0.1
