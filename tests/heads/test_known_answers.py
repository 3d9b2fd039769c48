"""Every head on conditional distributions whose answer is known: generative ones recover all modes, the L1
head averages them."""

import known_problems
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import tiny_models

NUM_SAMPLES = 1000


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


DISTRIBUTIONAL = ["bins", "ddim", "ddpm", "edm", "fast", "flow_matching", "hybrid", "mixture", "ot_cfm"]


def made(name: str, **changes):
    torch.manual_seed(0)
    node = OmegaConf.to_container(tiny_models.load("head", name))
    head = instantiate(OmegaConf.create(node | changes), _convert_="all")
    head.attach(horizon=known_problems.HORIZON, action_dim=known_problems.ACTION_DIM)
    return head


def network_for(head):
    name = {"denoiser": "mlp", "decoder": "causal", "pair": "pair"}[head.network]
    small = {"width": 128, "num_layers": 3, "num_blocks": 3, "num_heads": 4}
    node = OmegaConf.to_container(tiny_models.load("network", name))

    def fitted(node):
        changed = {key: small.get(key, value) for key, value in node.items()}
        if name == "pair" and "denoiser" in changed:
            mlp = OmegaConf.to_container(tiny_models.load("network", "mlp"))
            changed |= {"denoiser": fitted_leaf(mlp), "decoder": fitted_leaf(changed["decoder"])}
        return changed

    def fitted_leaf(node):
        return {key: small.get(key, value) for key, value in node.items()}

    return instantiate(OmegaConf.create(fitted(node)), _convert_="all")(sizes=known_problems.sizes_for(head))


def trained(name: str, problem, *, num_steps: int, **changes):
    head = made(name, **changes)
    if head.needs_fit:
        generator = torch.Generator().manual_seed(3)
        head.fit(problem.draw(torch.randint(2, (4000,), generator=generator), generator))
    network = network_for(head)
    known_problems.train(head, network, problem, num_steps=num_steps)
    return head.eval(), network.eval()


@torch.no_grad()
def drawn(head, network, which: int) -> torch.Tensor:
    torch.manual_seed(4)
    context = known_problems.context_of(torch.full((NUM_SAMPLES,), which))
    return head.sample(network, context, (NUM_SAMPLES, known_problems.HORIZON, known_problems.ACTION_DIM))


@pytest.mark.slow
@pytest.mark.parametrize("problem", known_problems.PROBLEMS)
@pytest.mark.parametrize("name", DISTRIBUTIONAL)
def test_every_mode_is_recovered(name, problem):
    problem = known_problems.PROBLEMS[problem]()
    head, network = trained(name, problem, num_steps=3000, **OPTIONS.get(name, {}))
    generator = torch.Generator().manual_seed(5)
    for which in range(known_problems.NUM_CONTEXTS):
        samples = drawn(head, network, which)
        true = [problem.draw(torch.full((NUM_SAMPLES,), which), generator) for _ in range(6)]
        modes = problem.modes[which]
        exact = known_problems.shares(problem.draw(torch.full((100_000,), which), generator), modes)
        assert (known_problems.shares(samples, modes) - exact).abs().max() < 0.05
        distance = sum(known_problems.sliced_wasserstein(samples, other) for other in true) / len(true)
        between = [known_problems.sliced_wasserstein(true[i], true[j]) for i in range(6) for j in range(i)]
        assert distance < 1.5 * sum(between) / len(between)


# Samplers with enough steps that discretisation is not what is measured; enough modes for a ring.
OPTIONS = {
    "flow_matching": {"num_steps": 50},
    "ot_cfm": {"num_steps": 50},
    "ddpm": {"num_steps": 50},
    "mixture": {"num_modes": 24},
}


def test_the_l1_head_averages():
    """With modes of equal weight the least absolute error lies anywhere between them, never only at one; of
    a 70% mode it is that mode, and the squared error's answer is the mean. Both miss the other mode."""
    problem = known_problems.two_modes()
    centre = 0.3 * problem.modes[:, 0] + 0.7 * problem.modes[:, 1]
    head, network = trained("mse", problem, num_steps=400)
    for which in range(2):
        samples = drawn(head, network, which)
        assert samples.std(dim=0).max() < 1e-5, "one answer, whatever the noise"
        assert (samples[0, 0] - centre[which]).abs().max() < 0.1
    head, network = trained("l1", problem, num_steps=400)
    for which in range(2):
        samples = drawn(head, network, which)
        assert samples.std(dim=0).max() < 1e-5
        assert known_problems.shares(samples, problem.modes[which]).max() == 1.0, "the other mode is lost"
    ring = known_problems.ring()
    head, network = trained("l1", ring, num_steps=400)
    radius = drawn(head, network, 1)[0, 0].norm()
    assert radius < 0.25, "the centre of the ring, where no demonstration is"
