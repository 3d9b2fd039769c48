"""Consistency distillation's parts, with teachers that know a Gaussian exactly."""

import itertools
import math

import pytest
import torch

from librobot.heads.base import further_noise
from librobot.heads.consistency import Consistency
from librobot.heads.ddpm import DDPM
from librobot.heads.edm import EDM
from librobot.heads.flow_matching import FlowMatching

MEAN, STD = 0.5, 0.2
NOISE = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(0))


def clean(x, signal, sigma):
    """E[actions | x] where x = signal * actions + sigma * noise and actions are N(MEAN, STD^2)."""
    return MEAN + signal * STD**2 / (signal**2 * STD**2 + sigma**2) * (x - signal * MEAN)


def flow_network(x, time, context):
    t = time[:, None, None]
    return (x - clean(x, 1 - t, t)) / t


def ddpm_network(head):
    def denoiser(x, time, context):
        log_abar = head.alphas_bar.double().log()
        place = time[0].double() * head.num_train_steps - 1  # between two levels, where the teacher is asked
        low = int(place.floor().clamp(0, head.num_train_steps - 2))
        abar = torch.lerp(log_abar[low], log_abar[low + 1], place - low).exp()
        signal, sigma = abar.sqrt(), (1 - abar).sqrt()
        found = clean(x.double(), signal, sigma)
        return (found if head.prediction == "sample" else (x - signal * found) / sigma).float()

    return denoiser


def edm_network(head):
    def denoiser(scaled, time, context):
        sigma = head.sigma(time)[:, None, None]
        c_skip, c_out, c_in = head.preconditioning(sigma)
        return (clean(scaled / c_in, 1.0, sigma) - c_skip * scaled / c_in) / c_out

    return denoiser


def teachers():
    made = {"flow": (FlowMatching(), flow_network)}
    for prediction in ("epsilon", "sample"):
        head = DDPM(prediction=prediction)
        made[prediction] = (head, ddpm_network(head))
    edm = EDM()
    return made | {"edm": (edm, edm_network(edm))}


def teachers_path(head, network, solver: str):
    """Where 20 of the teacher's steps lead, the first from pure noise and the last to 0."""
    student = Consistency(teacher_solver=solver)
    student.teach(head, network)
    x, times = NOISE, torch.arange(20, -1, -1) / 20
    for here, there in itertools.pairwise(times):
        x = student._teacher_step(x, here.expand(50), there.expand(50), None)
    return x


@pytest.mark.parametrize("name", teachers())
def test_the_teachers_steps_follow_the_exact_path(name):
    """The exact flow takes z to MEAN + STD * z; Heun's steps come nearer to that than Euler's."""
    errors = [
        (teachers_path(*teachers()[name], solver) - MEAN - STD * NOISE).abs().mean().item()
        for solver in ("heun", "euler")
    ]
    assert errors[0] < 0.01
    assert errors[0] < 0.5 * errors[1], errors


def test_a_ddpm_teacher_is_bounded_as_in_its_own_sampling():
    """Near t = 1 an error of epsilon is divided by almost 0; `clip` stops it from leaving the data."""
    head = DDPM(prediction="epsilon", clip=1.0)
    exact = ddpm_network(head)
    path = teachers_path(head, lambda x, time, context: exact(x, time, context) + 0.02, "heun")
    assert (path - MEAN - STD * NOISE).abs().mean() < 0.1


def student(**options):
    head = Consistency(**{"distance": "mse"} | options)
    head.attach(horizon=2, action_dim=3)
    head.teach(FlowMatching(), flow_network)
    return head


def mean_velocity(x, time, context):
    """The student's exact answer: from x_t to the path's end, divided by t."""
    t = time[:, None, None]
    scale = (t.square() + (1 - t).square() * STD**2).sqrt()
    end = MEAN + STD * (x - (1 - t) * MEAN) / scale
    return (x - end) / t.clamp_min(1e-6)


def test_the_end_of_a_path_at_its_end_is_the_point_itself():
    x = torch.randn(50, 2, 3)
    assert torch.equal(student().end(lambda x, t, c: torch.randn_like(x), x, torch.zeros(50), None), x)


def test_an_exact_student_has_no_loss_and_draws_in_one_step():
    mask, actions = torch.ones(50, 2, dtype=torch.bool), MEAN + STD * torch.randn(50, 2, 3)
    head = student(teacher_steps=50)
    for time in (0.1, 0.5, 1.0):
        times = torch.full((50,), time)
        right, wrong = (
            head.loss(network, None, actions, mask, noise=NOISE, time=times).mean()
            for network in (mean_velocity, lambda x, t, c: mean_velocity(x, t, c) + 0.2)
        )
        # An error of 0.2 in the velocity moves the end by 0.2 t, the target's by 0.2 s.
        expected = 0.2 * min(1.0, 1 / 5 / time)
        assert right < 1e-4, time
        assert wrong.item() == pytest.approx(expected**2, rel=0.1)
    drawn = student().sample(mean_velocity, None, (50, 2, 3), noise=NOISE)
    torch.testing.assert_close(drawn, MEAN + STD * NOISE, atol=1e-5, rtol=0)


@pytest.mark.parametrize("which", ["given", "first", "fresh"])
def test_further_steps_go_back_with_noise(which):
    """By hand: map, go back to t = 1/2 with the second noise, map again."""
    second = {"given": NOISE.flip(0), "first": NOISE, "fresh": further_noise(NOISE, 1)}[which]
    expected_x = 0.5 * second + 0.5 * (MEAN + STD * NOISE)
    expected = expected_x - 0.5 * mean_velocity(expected_x, torch.full((50,), 0.5), None)
    noise = torch.stack((NOISE, second)) if which == "given" else NOISE
    head = student(fresh_noise=which == "fresh")
    drawn = head.sample(mean_velocity, None, (50, 2, 3), noise=noise, num_steps=2)
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)


def test_the_teacher_crosses_an_interval_in_several_steps():
    """Two Heun steps over a fifth of the path come nearer to its exact point than one."""
    t = torch.full((50,), 0.9)
    x_t = 0.9 * NOISE + 0.1 * MEAN
    scale = [math.sqrt(time**2 + (1 - time) ** 2 * STD**2) for time in (0.9, 0.7)]
    exact = 0.3 * MEAN + scale[1] / scale[0] * (x_t - 0.1 * MEAN)
    errors = [
        (student(teacher_steps=n)._teacher_path(x_t, t, t - 0.2, None) - exact).abs().mean() for n in (1, 2)
    ]
    assert errors[1] < 0.4 * errors[0]
    assert errors[1] < 1e-3


def test_the_pseudo_huber_distance():
    """Song and Dhariwal 2024, equation 7, for each of d elements alike: sqrt(|x|^2 + c^2) - c with
    c = 0.00054 * sqrt(d), divided by sqrt(d)."""
    head = Consistency(distance="pseudo_huber")
    found, target = torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    target[1] = found[1]
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[0, 3:] = False
    for row in range(4):
        d = 6 * int(mask[row].sum())
        c = 0.00054 * d**0.5
        distance = (found - target)[row, mask[row]].double().square().sum()
        expected = ((distance + c**2).sqrt() - c) / d**0.5
        assert head._distance(found, target, mask)[row].item() == pytest.approx(expected.item(), rel=1e-5)
