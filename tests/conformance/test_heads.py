"""What every action head must hold, and what it must draw from a denoiser that knows the answer."""

import inspect
from dataclasses import dataclass, field, replace

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

import tiny_models
from librobot.heads.flow_matching import FlowMatching
from librobot.heads.reflow import Reflow
from librobot.losses import Record, recorded

HEADS = tiny_models.options("head")
WHOLE = ("mixture",)  # one density for all numbers of a chunk
FUNCTIONS_OF_MEANS = ("consistency", "cvae", "hybrid", "octo_ddpm")  # and of other things


SHAPE = (3, 5, 4)


@pytest.fixture(params=HEADS)
def name(request):
    return request.param


@pytest.fixture
def head(name):
    return made(name)


def made(name: str, **changes):
    """The head, ready: attached to the chunk's shape, fitted, taught by a flow head where it distils."""
    torch.manual_seed(0)
    node = OmegaConf.create(tiny_models.node("head", name, **changes))
    head = instantiate(node, _convert_="all")
    head.attach(horizon=SHAPE[1], action_dim=SHAPE[2])
    if head.needs_fit:
        head.fit(torch.randn(64, *SHAPE[1:]))
    if hasattr(head, "teach"):
        teacher = FlowMatching()
        teacher.attach(horizon=SHAPE[1], action_dim=SHAPE[2])
        head.teach(teacher, lambda x_t, time, context: 0.5 * x_t)
    return head


@dataclass
class Context:
    """A matrix for each sample, hidden by zeros."""

    matrices: torch.Tensor
    features: torch.Tensor

    def dropped(self, rows):
        return replace(self, matrices=self.matrices.masked_fill(rows[:, None, None], 0.0))

    def detach(self):
        return replace(self, matrices=self.matrices.detach())

    def __getitem__(self, rows):
        return Context(self.matrices[rows], self.features[rows])


@dataclass
class Mixing:
    """A denoiser whose steps and dimensions all see each other."""

    width: int
    calls: list = field(default_factory=list)

    def __call__(self, x_t, time, context):
        self.calls.append(time.clone())
        mixed = torch.tanh(x_t.cumsum(1).flip(1).cumsum(1) @ context.matrices + time[:, None, None])
        return mixed.repeat(1, 1, -(-self.width // mixed.shape[-1]))[..., : self.width]


@dataclass
class Counting:
    """A causal decoder: logits from the running sum of what came before."""

    vocabulary: int
    calls: list = field(default_factory=list)

    def logits(self, total, context):
        place = torch.arange(self.vocabulary) / self.vocabulary
        seen = context.matrices.sum((1, 2)).view(-1, *[1] * (total.ndim - 1))
        return torch.sin(7 * place + 0.1 * (total + seen)[..., None])

    def __call__(self, tokens, context):
        before = torch.nn.functional.pad(tokens.cumsum(1), (1, -1)).float()
        return self.logits(before, context)

    def begin(self, context):
        total = torch.zeros(len(context.matrices))

        def step(tokens):
            nonlocal total
            self.calls.append(tokens)
            total = total if tokens is None else total + tokens
            return self.logits(total, context)

        return step


class Halved:
    """The same network as one in bfloat16 answers: whatever comes in, bfloat16 goes out."""

    def __init__(self, network):
        self.network = network

    def __call__(self, *args):
        floats = [torch.is_tensor(x) and x.is_floating_point() for x in args]
        half = [x.bfloat16() if is_float else x for x, is_float in zip(args, floats, strict=True)]
        return self.network(*half).bfloat16()

    def __getitem__(self, key):
        return Halved(self.network[key])

    def begin(self, context):
        state = self.network.begin(context)
        return lambda tokens: state(tokens).bfloat16()


def network_for(head):
    denoiser = None if head.network == "decoder" else Mixing(head.output_width)
    decoder = None if head.network == "denoiser" else Counting(head.vocabulary)
    return {"denoiser": denoiser, "decoder": decoder, "pair": {"denoiser": denoiser, "decoder": decoder}}[
        head.network
    ]


def inputs(size: int = 3):
    draw = torch.Generator().manual_seed(1)
    actions = torch.randn(size, 5, 4, generator=draw)
    noise = torch.randn(size, 5, 4, generator=draw)
    matrices = torch.randn(4, 4, generator=draw).expand(size, 4, 4)
    return actions, noise, torch.linspace(0.2, 0.9, size), Context(matrices, torch.zeros(size, 2))


def test_a_loss_per_sample_without_gradient_of_the_hidden(head):
    actions, noise, time, context = inputs()
    actions.requires_grad_()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    loss = head.loss(network_for(head), context, actions, mask, noise=noise, time=time)
    assert loss.shape == (3,)
    assert loss.dtype == torch.float32
    if head.network == "decoder" or isinstance(head, Reflow):
        return  # tokens have no gradient, reflow looks at no actions; the next test holds what is hidden
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
    before = head.loss(network_for(head), context, actions, mask, noise=noise, time=time)
    changed = actions.masked_fill(~mask, hidden)
    assert torch.equal(head.loss(network_for(head), context, changed, mask, noise=noise, time=time), before)


def test_a_sample_with_nothing_to_learn_has_no_loss(head):
    actions, noise, time, context = inputs()
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0] = False
    loss = head.loss(network_for(head), context, actions, mask, noise=noise, time=time)
    assert loss[0] == 0
    assert (loss[1:] > 0).all()


def test_samples_are_independent_and_fixed_by_noise(head):
    _, noise, _, context = inputs()
    together = head.sample(network_for(head), context, (3, 5, 4), noise=noise)
    torch.manual_seed(123)
    assert torch.equal(head.sample(network_for(head), context, (3, 5, 4), noise=noise), together)
    alone = head.sample(network_for(head), context[1:2], (1, 5, 4), noise=noise[1:2])
    torch.testing.assert_close(alone[0], together[1])


def test_the_number_of_steps_is_the_number_of_calls(head):
    """One call for each step, but for solvers that say otherwise; times fall from pure noise."""
    if head.network != "denoiser":
        pytest.skip("tokens have no sampling steps")
    network = network_for(head)
    _, noise, _, context = inputs()
    head.sample(network, context, SHAPE, noise=noise, num_steps=3)
    noisy = head.generative and isinstance(getattr(head, "num_steps", None), int)
    expected = (head.num_calls(3) if hasattr(head, "num_calls") else 3) if noisy else 1
    assert len(network.calls) == expected
    if noisy:
        times = torch.stack(network.calls)[:, 0]
        if getattr(head, "time_convention", None) == "noise_at_zero":
            times = 1 - times
        assert times[0] == 1.0, "sampling starts at pure noise"
        assert (times.diff() < 0).all()


def test_guidance_and_dropped_context():
    """Heads that have guidance extrapolate from the hidden context, the others say that they have none."""
    _, noise, _, context = inputs()
    for name in HEADS:
        takes = "drop_context" in inspect.signature(type(made(name)).__init__).parameters
        head = made(name, **({"drop_context": 0.5} if takes else {}))
        network = network_for(head)
        plain = head.sample(network, context, SHAPE, noise=noise)
        if not takes:
            with pytest.raises(ValueError, match="guidance"):
                head.sample(network, context, SHAPE, noise=noise, guidance=2.0)
            continue
        guided = head.sample(network, context, SHAPE, noise=noise, guidance=6.0)  # few tokens move slowly
        everyone = torch.ones(len(context.matrices), dtype=torch.bool)
        unconditional = head.sample(network, context.dropped(everyone), SHAPE, noise=noise, guidance=2.0)
        without = head.sample(network, context.dropped(everyone), SHAPE, noise=noise)
        assert torch.equal(head.sample(network, context, SHAPE, noise=noise, guidance=1.0), plain)
        assert not torch.allclose(guided, plain), name
        torch.testing.assert_close(unconditional, without, msg=lambda m, name=name: f"{name}: {m}")


def test_dimension_weights(name, head):
    """Equal weights change nothing; a heavier dimension's error counts for more."""
    if "dim_weights" not in inspect.signature(type(head).__init__).parameters:
        pytest.skip("no weights: its objective does not split by dimension")
    actions, noise, time, context = inputs()
    mask = torch.ones(SHAPE[:2], dtype=torch.bool)
    losses = {}
    if getattr(getattr(head, "tokenizer", None), "mixes", False):
        with pytest.raises(InstantiationException, match="dim_weights must be null"):
            made(name, dim_weights=[1.0] * 4)
        return
    for weights in (None, [2.0] * 4, [9.0, 1.0, 1.0, 1.0]):
        weighted = made(name, dim_weights=weights)
        found = weighted.loss(network_for(weighted), context, actions, mask, noise=noise, time=time)
        losses[str(weights)] = found
    none, equal, uneven = losses.values()
    torch.testing.assert_close(equal, none)
    assert not torch.allclose(uneven, none)
    with pytest.raises(ValueError, match="dim_weights"):
        made(name, dim_weights=[1.0, 2.0])


def test_in_bfloat16(head):
    """Weights and noise in bfloat16: finite losses in float32, finite actions."""
    head = head.to(torch.bfloat16)
    actions, noise, time, context = inputs()
    context = replace(context, matrices=context.matrices.bfloat16())
    network = network_for(head)
    half = [x.bfloat16() for x in (actions, noise)]
    mask = torch.ones(SHAPE[:2], dtype=torch.bool)
    loss = head.loss(Halved(network), context, half[0], mask, noise=half[1], time=time)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss).all()
    assert torch.isfinite(head.sample(Halved(network), context, SHAPE, noise=half[1]).float()).all()


def test_the_loss_trains_what_sampling_needs(name):
    """Fit a network that knows nothing but time to one constant chunk, and draw that chunk."""
    torch.manual_seed(0)
    target = torch.tensor([[0.7, -0.4]])
    head = instantiate(tiny_models.load("head", name), _convert_="all")
    if head.network != "denoiser" or hasattr(head, "teach"):
        pytest.skip("not a denoiser's own objective")
    head.attach(horizon=4, action_dim=2)
    width = head.output_width
    network = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, width))
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=1e-2)

    def denoiser(x_t, time, context):
        return network(torch.cat((x_t, time[:, None, None].expand(-1, x_t.shape[1], 1)), dim=-1))

    actions, mask = target.expand(256, 4, 2), torch.ones(256, 4, dtype=torch.bool)
    context = Context(torch.zeros(256, 1, 1), torch.zeros(256, 1))
    for _ in range(300):
        optimizer.zero_grad()
        head.loss(denoiser, context, actions, mask).mean().backward()
        optimizer.step()
    with torch.no_grad():
        drawn = head.sample(denoiser, context[:64], (64, 4, 2))
    assert (drawn.mean(0) - target).abs().max() < 0.1


def test_what_the_loss_is_a_mean_of_can_be_seen(name):
    """`losses.recorded`: the error of each number, of every head whose loss is a mean over numbers."""
    head = made(name)
    actions, noise, time, context = inputs()
    mask = torch.ones(3, 5, 4, dtype=torch.bool)
    mask[1, 3:] = False
    mask[:, :, 3] = False
    record = Record()
    with recorded(record):
        loss = head.loss(network_for(head), context, actions, mask, noise=noise, time=time)
    nowhere = Record()
    head.loss(network_for(head), context, actions, mask, noise=noise, time=time)
    assert not nowhere.elements
    if name in WHOLE or getattr(getattr(head, "tokenizer", None), "mixes", False):
        assert not record.elements
        return
    errors = torch.stack([error for error, _ in record.elements])
    assert errors.shape[1:] == SHAPE
    assert all(torch.equal(real, mask) for _, real in record.elements)
    assert not errors.requires_grad
    assert (errors[:, ~mask] == 0).all()
    assert (errors[:, mask] != 0).any(dim=0).all()
    if name not in FUNCTIONS_OF_MEANS:
        means = errors.mean(dim=0).sum(dim=(1, 2)) / mask.sum(dim=(1, 2))
        torch.testing.assert_close(means, loss.detach())
