"""Solvers against the exact flow of a Gaussian."""

import itertools
import math

import pytest
import torch

from librobot.heads import ode_solvers
from librobot.heads.flow_matching import FlowMatching

MEAN, STD = torch.tensor([0.7, -0.2]), torch.tensor([0.3, 1.5])


def velocity(x, time):
    """E[noise - actions | x_t] for actions from N(MEAN, STD^2), in float64 inside.

    With x_t = t * noise + (1 - t) * actions, x_t is N((1 - t) MEAN, s_t^2), s_t^2 = t^2 + (1 - t)^2 STD^2,
    and dx/dt = d/dt of its mean and scale: -MEAN + (x - (1 - t) MEAN) * s_t' / s_t.
    """
    variance = time**2 + (1 - time) ** 2 * STD.double() ** 2
    rate = (time - (1 - time) * STD.double() ** 2) / variance
    return (-MEAN + (x.double() - (1 - time) * MEAN) * rate).float()


def exact(noise):
    """s_t / s_1 carries a point along: x_0 = MEAN + STD * x_1."""
    return MEAN + STD * noise


NOISE = torch.randn(64, 3, 2, generator=torch.Generator().manual_seed(0))


def error(solver: str, num_steps: int) -> float:
    found = ode_solvers.integrate(velocity, NOISE, num_steps, solver)
    return (found - exact(NOISE)).square().mean().sqrt().item()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_the_error_falls_with_the_order(solver, order):
    errors = [error(solver, num_steps) for num_steps in (10, 20, 40, 80)]
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    # The midpoint rule does better than its order here: the problem is symmetric about t = 1/2 for STD = 1.
    assert sum(slopes) / len(slopes) > order - 0.25
    if solver != "midpoint":
        assert sum(slopes) / len(slopes) < order + 0.25
    assert errors == sorted(errors, reverse=True)


def test_the_adaptive_solver_is_within_its_tolerance():
    found = ode_solvers.integrate_adaptively(velocity, NOISE, rtol=1e-6, atol=1e-6)
    assert (found - exact(NOISE)).abs().max() < 1e-4


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "adaptive"])
@pytest.mark.parametrize("convention", ["noise_at_one", "noise_at_zero"])
def test_a_head_samples_the_gaussian(solver, convention):
    """Each noise ends where the exact flow takes it: the two time conventions are one network seen from two
    sides."""
    head = FlowMatching(solver=solver, num_steps=60, time_convention=convention)

    def denoiser(x, time, context):
        if convention == "noise_at_one":
            return velocity(x, time[0].item())
        return -velocity(x, 1 - time[0].item())

    difference = (head.sample(denoiser, None, NOISE.shape, noise=NOISE) - exact(NOISE)).abs().max()
    assert difference < (0.2 if solver == "euler" else 1e-3)


def test_calls_are_counted():
    for solver, expected in (("euler", 4), ("midpoint", 8), ("heun", 8), ("adaptive", None)):
        head, calls = FlowMatching(solver=solver), []

        def denoiser(x, time, context, calls=calls):
            calls.append(time)
            return velocity(x, time[0].item())

        head.sample(denoiser, None, NOISE.shape, noise=NOISE, num_steps=4)
        assert head.num_calls(4) == expected
        assert expected is None or len(calls) == expected
