"""Reflow and consistency distillation, from teachers that are exact or trained; OT-CFM's straight paths."""

import math

import pytest
import torch
from known_problems import sliced_wasserstein

from librobot.heads.consistency import Consistency
from librobot.heads.ddpm import DDPM
from librobot.heads.edm import EDM
from librobot.heads.flow_matching import FlowMatching
from librobot.heads.reflow import Reflow
from librobot.heads.regression import L1
from librobot.heads.teacher import Teacher

MODES, WEIGHTS, SPREAD = torch.tensor([-1.0, 1.0]), torch.tensor([0.4, 0.6]), 0.2


def clean(x, signal, sigma):
    """E[actions | x] where x = signal * actions + sigma * noise, actions from a mixture of two Gaussians."""
    signal, sigma = (torch.as_tensor(y, dtype=x.dtype)[..., None] for y in (signal, sigma))
    total = signal**2 * SPREAD**2 + sigma**2
    logits = WEIGHTS.log() - (x[..., None] - signal * MODES).square() / (2 * total)
    mean = MODES + signal * SPREAD**2 / total * (x[..., None] - signal * MODES)
    return (logits.softmax(-1) * mean).sum(-1)


def exact_flow(x, time, context):
    t = time.double()[:, None, None].clamp_min(1e-4)
    return ((x.double() - clean(x.double(), 1 - t, t)) / t).float()


def exact_ddpm(head):
    def denoiser(x, time, context):
        index = (time * head.num_train_steps).round().long() - 1
        abar = head.alphas_bar.double()[index][:, None, None]
        signal, sigma = abar.sqrt(), (1 - abar).sqrt()
        found = clean(x.double(), signal, sigma)
        noise = (x.double() - signal * found) / sigma
        wanted = {"epsilon": noise, "sample": found, "v": signal * noise - sigma * found}
        return wanted[head.prediction].float()

    return denoiser


def exact_edm(head):
    def denoiser(scaled, time, context):
        sigma = head.sigma(time).double()[:, None, None]
        c_skip, c_out, c_in = head.preconditioning(sigma)
        x = scaled.double() / c_in
        return ((clean(x, 1.0, sigma) - c_skip * x) / c_out).float()

    return denoiser


def teachers():
    made = {"flow": (FlowMatching(), exact_flow)}
    for prediction in ("epsilon", "sample", "v"):
        head = DDPM(prediction=prediction, num_train_steps=4000, clip=None)
        made[f"ddpm-{prediction}"] = (head, exact_ddpm(head))
    edm = EDM()
    made["edm"] = (edm, exact_edm(edm))
    return made


@pytest.mark.parametrize("name", ["flow", "ddpm-epsilon", "ddpm-sample", "ddpm-v", "edm"])
def test_every_teacher_gives_the_velocity_of_the_straight_path(name):
    """Diffusion at another scale is the same path: their velocities agree with the flow's closed form."""
    teacher = Teacher(None)
    teacher.take(*teachers()[name])
    x = torch.linspace(-1.5, 1.5, 40).view(4, 10, 1)
    for time in (0.1, 0.5, 0.9):
        t = torch.full((4,), time)
        difference = (teacher.velocity(x, t, None) - exact_flow(x, t, None)).abs().max()
        assert difference < (1e-5 if name == "flow" else 0.02), (time, difference)


@pytest.mark.parametrize("head", [Consistency(), Reflow()])
def test_a_teacher_is_needed(head):
    head.attach(horizon=1, action_dim=1)
    mask, actions = torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, 1, 1)
    with pytest.raises(ValueError, match=r"head.teacher=CHECKPOINT"):
        head.loss(exact_flow, None, actions, mask)
    with pytest.raises(ValueError, match="L1"):
        head.teach(L1(), exact_flow)
    head.teach(FlowMatching(), torch.nn.Linear(1, 1))
    assert not [name for name in head.state_dict() if "teacher" in name]


class Network(torch.nn.Module):
    def __init__(self, width: int = 64, dim: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(dim + 8, width), torch.nn.SiLU(), torch.nn.Linear(width, width), torch.nn.SiLU(),
            torch.nn.Linear(width, width), torch.nn.SiLU(), torch.nn.Linear(width, dim),
        )  # fmt: skip

    def forward(self, x, time, context):
        angle = math.pi * time[:, None, None] * torch.tensor([0.5, 1.0, 2.0, 4.0])
        embedded = torch.cat((angle.sin(), angle.cos()), dim=-1).expand(-1, x.shape[1], -1)
        return self.layers(torch.cat((x, embedded), dim=-1))


def train(head, network, draw, num_steps: int, count: int = 128):
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        actions = draw(count)
        optimizer.zero_grad()
        mask = torch.ones(actions.shape[:2], dtype=torch.bool)
        head.loss(network, Features(count), actions, mask).mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


class Features:
    """One situation for all."""

    def __init__(self, count: int) -> None:
        self.features = torch.zeros(count, 1)


def mixture(count: int):
    which = (torch.rand(count) < WEIGHTS[1]).long()
    return (MODES[which] + SPREAD * torch.randn(count))[:, None, None]


NOISE = torch.randn(2000, 1, 1, generator=torch.Generator().manual_seed(7))


def drawn(head, network, num_steps: int):
    with torch.no_grad():
        return head.sample(network, Features(2000), tuple(NOISE.shape), noise=NOISE, num_steps=num_steps)


@pytest.mark.slow
def test_one_consistency_step_is_the_teachers_whole_path():
    """From the same noise the teacher's own answer; further steps draw from its distribution, ever nearer."""
    head = Consistency()
    head.attach(horizon=1, action_dim=1)
    head.teach(FlowMatching(), exact_flow)
    torch.manual_seed(0)
    network = train(head, Network(), mixture, 1000)
    reference = drawn(FlowMatching(), exact_flow, 200)
    ours = (drawn(head, network, 1) - reference).abs().mean().item()
    crude = (drawn(FlowMatching(), exact_flow, 1) - reference).abs().mean().item()
    assert ours < 0.1 * crude
    share = (drawn(head, network, 1) > 0).float().mean().item()
    assert abs(share - (reference > 0).float().mean().item()) < 0.05
    truth = mixture(len(NOISE))
    distances = {n: sliced_wasserstein(drawn(head, network, n), truth) for n in (1, 4)}
    assert distances[4] < distances[1], distances
    assert distances[4] < 0.6 * sliced_wasserstein(drawn(FlowMatching(), exact_flow, 4), truth)


@pytest.mark.slow
def test_reflow_straightens_what_it_learns_from():
    head = Reflow(num_steps=1)
    head.attach(horizon=1, action_dim=1)
    head.teach(FlowMatching(), exact_flow)
    network = train(head, Network(), mixture, 1000)
    reference = drawn(FlowMatching(), exact_flow, 200)
    ours = (drawn(head, network, 1) - reference).abs().mean().item()
    crude = (drawn(FlowMatching(), exact_flow, 1) - reference).abs().mean().item()
    assert ours < 0.4 * crude


def eight_gaussians(count: int):
    angle = torch.randint(8, (count,)) * math.pi / 4
    centre = torch.stack((angle.cos(), angle.sin()), dim=-1) * 2
    return (centre + 0.1 * torch.randn(count, 2))[:, None]


def path_energy(network, noise) -> float:
    """The mean over the path of |v|^2, by 100 Euler steps."""
    x, total = noise, 0.0
    with torch.no_grad():
        for step in range(100):
            v = network(x, torch.full((len(x),), 1 - step / 100), None)
            total += v.square().sum(dim=(1, 2)).mean().item() / 100
            x = x - v / 100
    return total


@pytest.mark.slow
def test_optimal_transport_makes_paths_straight():
    """Less path energy than independent pairs, and as near to the truth in fewer steps."""
    noise = torch.randn(2000, 1, 2, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    truth = eight_gaussians(2000)
    energy, distance = {}, {}
    for coupling in ("independent", "optimal_transport"):
        head = FlowMatching(coupling=coupling, time_distribution="uniform")
        head.attach(horizon=1, action_dim=2)
        torch.manual_seed(5)
        network = train(head, Network(dim=2), eight_gaussians, 1000)
        energy[coupling] = path_energy(network, noise)
        with torch.no_grad():
            samples = {
                n: head.sample(network, None, tuple(noise.shape), noise=noise, num_steps=n) for n in (2, 4, 8)
            }
        distance[coupling] = {n: sliced_wasserstein(x, truth) for n, x in samples.items()}
    assert energy["optimal_transport"] < 0.9 * energy["independent"]
    for few, more in ((2, 4), (4, 8)):
        assert distance["optimal_transport"][few] < distance["independent"][more] * 1.1, (few, distance)
    assert distance["optimal_transport"][2] < 0.6 * distance["independent"][2]
