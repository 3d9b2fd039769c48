"""The autoregressive head over small causal networks: what counts in its loss, and how it samples."""

import math

import pytest
import torch
from torch import nn

from librobot.heads.autoregressive import GOLDEN_RATIO, Autoregressive
from librobot.tokenizers.bins import Bins
from librobot.tokenizers.fast import FAST

HORIZON, ACTION_DIM, WIDTH = 4, 2, 16


class Summing(nn.Module):
    """A decoder double: logits from the sum of the context and of all tokens before, each at its position."""

    def __init__(self, vocabulary: int, max_tokens: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.tokens = nn.Parameter(torch.randn(vocabulary, WIDTH, generator=draw))
        self.positions = nn.Parameter(torch.randn(max_tokens, WIDTH, generator=draw))
        self.out = nn.Parameter(torch.randn(WIDTH, vocabulary, generator=draw))
        self.calls = 0

    def forward(self, tokens, context):
        before = torch.cat((context.values[:, None], self.tokens[tokens[:, :-1]]), dim=1).cumsum(1)
        return torch.tanh(before + self.positions[: tokens.shape[1]]) @ self.out

    def begin(self, context):
        total, position = context.values, 0

        def following(tokens):
            nonlocal total, position
            self.calls += 1
            assert (tokens is None) == (position == 0)
            if tokens is not None:
                total = total + self.tokens[tokens]
            position += 1
            return torch.tanh(total + self.positions[position - 1]) @ self.out

        return following


class Context:
    def __init__(self, values):
        self.values = values

    def dropped(self, rows):
        return Context(self.values.masked_fill(rows[:, None], 0.0))


class Table(nn.Module):
    """A decoder that says the same of every token: one row of logits per position."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, tokens, context):
        return self.logits[: tokens.shape[1]].expand(len(tokens), -1, -1)

    def begin(self, context):
        rows = iter(self.logits)
        return lambda tokens: next(rows).expand(len(context.values), -1)


def chunks(count: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (0.4 * torch.randn(count, HORIZON, ACTION_DIM, generator=draw)).cumsum(1).clamp(-1, 1)


def context(count: int) -> Context:
    return Context(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(3)))


def noise(count: int, seed: int = 4) -> torch.Tensor:
    return torch.randn(count, HORIZON, ACTION_DIM, generator=torch.Generator().manual_seed(seed))


def bins(**options) -> Autoregressive:
    return attached(Autoregressive(tokenizer=Bins(num_bins=16), **options))


def fast(**options) -> Autoregressive:
    head = attached(Autoregressive(tokenizer=FAST(vocab_size=100), **options))
    assert head.needs_fit
    head.fit(chunks(300))
    assert not head.needs_fit
    return head


def attached(head: Autoregressive) -> Autoregressive:
    head.attach(horizon=HORIZON, action_dim=ACTION_DIM)
    return head


HEADS = {"bins": bins, "fast": fast}


@pytest.fixture(params=HEADS)
def make(request):
    return HEADS[request.param]


def network_for(head: Autoregressive) -> Summing:
    return Summing(head.vocabulary, head.max_tokens)


def everything(count: int) -> torch.Tensor:
    return torch.ones(count, HORIZON, dtype=torch.bool)


def test_the_loss_is_the_mean_cross_entropy(make):
    head, actions = make(label_smoothing=0.1), chunks(5)
    network = network_for(head)
    loss = head.loss(network, context(5), actions, everything(5))
    ids, mask = head.tokenizer.encode(actions)
    logp = network(ids, context(5)).log_softmax(-1)
    error = -0.9 * logp.gather(-1, ids[..., None]).squeeze(-1) - 0.1 * logp.mean(-1)
    expected = torch.stack([row[real].mean() for row, real in zip(error, mask, strict=True)])
    torch.testing.assert_close(loss, expected)
    plain = make().loss(network, context(5), actions, everything(5))
    assert (plain - loss).abs().min() > 1e-4


def test_bins_count_where_the_mask_is_true_and_as_weighted():
    head, actions = bins(dim_weights=[1.0, 3.0]), chunks(2)
    network = network_for(head)
    mask = torch.ones(2, HORIZON, ACTION_DIM, dtype=torch.bool)
    mask[0, 2:] = False
    mask[1, 0, 0] = False
    held = actions.clone()
    held[0, 2:] = held[0, 1]
    held[1, 0, 0] = held[1, 1, 0]
    ids = head.tokenizer.encode(held)[0]
    error = -network(ids, context(2)).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    weights = (mask * torch.tensor([1.0, 3.0])).flatten(1)
    expected = (error * weights).sum(1) / weights.sum(1)
    torch.testing.assert_close(head.loss(network, context(2), actions, mask), expected)


@pytest.mark.parametrize("hidden", [1e6, float("nan")])
def test_hidden_numbers_change_nothing(make, hidden):
    head, actions = make(), chunks(3)
    network = network_for(head)
    mask = torch.ones(3, HORIZON, ACTION_DIM, dtype=torch.bool)
    mask[1, 2:] = False
    mask[2] = False
    before = head.loss(network, context(3), actions, mask)
    assert before[2] == 0
    assert (before[:2] > 0).all()
    changed = actions.masked_fill(~mask, hidden)
    assert torch.equal(head.loss(network, context(3), changed, mask), before)
    head.loss(network, context(3), changed, mask).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_samples_are_independent_and_fixed_by_noise(make):
    head = make()
    network = network_for(head)
    shape = (6, HORIZON, ACTION_DIM)
    together = head.sample(network, context(6), shape, noise=noise(6))
    assert together.shape == shape
    assert torch.equal(head.sample(network, context(6), shape, noise=noise(6), num_steps=3), together)
    alone = head.sample(network, Context(context(6).values[2:3]), (1, *shape[1:]), noise=noise(6)[2:3])
    torch.testing.assert_close(alone[0], together[2])
    other = head.sample(network, context(6), shape, noise=noise(6, seed=5))
    assert (other != together).flatten(1).any(1).all()


def test_greedy_decoding_ignores_noise_and_is_teacher_forcings_best(make):
    head = make(temperature=0.0)
    network = network_for(head)
    assert make().stochastic
    assert not head.stochastic
    shape = (4, HORIZON, ACTION_DIM)
    greedy = head.sample(network, context(4), shape, noise=noise(4))
    assert torch.equal(head.sample(network, context(4), shape), greedy)
    ids = torch.zeros(4, 1, dtype=torch.long)
    constraint = head.tokenizer.constrain(4, torch.device("cpu"))
    while not constraint.done.all():
        logits = network(ids, context(4))[:, -1].masked_fill(~constraint.allowed(), -math.inf)
        ids[:, -1] = logits.argmax(-1)
        constraint.advance(ids[:, -1])
        ids = torch.cat((ids, torch.zeros(4, 1, dtype=torch.long)), dim=1)
    expected = head.tokenizer.decode(ids[:, :-1], torch.ones_like(ids[:, :-1], dtype=torch.bool))
    torch.testing.assert_close(greedy, expected)
    # The colder, the closer to that.
    cold = make(temperature=1e-3).sample(network, context(4), shape, noise=noise(4))
    torch.testing.assert_close(cold, greedy)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_each_number_is_drawn_from_its_own_distribution(temperature):
    head = bins(temperature=temperature)
    logits = 1.5 * torch.randn(head.max_tokens, 16, generator=torch.Generator().manual_seed(0))
    count = 20_000
    drawn = head.sample(Table(logits), context(count), (count, HORIZON, ACTION_DIM), noise=noise(count))
    ids = head.tokenizer.encode(drawn)[0]
    shares = nn.functional.one_hot(ids, 16).float().mean(0)
    exact = (logits / temperature).softmax(-1)
    # Five standard deviations of a share of 20000 are at most 0.018.
    assert (shares - exact).abs().max() < 0.018
    assert (logits.softmax(-1) - (logits / 2).softmax(-1)).abs().max() > 0.1


def test_tokens_are_quantiles_of_the_noise():
    head = bins()
    # All 16 bins alike: token j is floor(16 Phi(noise_j)).
    zeros, count = torch.zeros(head.max_tokens, 16), 50
    drawn = head.sample(Table(zeros), context(count), (count, HORIZON, ACTION_DIM), noise=noise(count))
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = (16 * normal.cdf(noise(count))).floor().long().flatten(1)
    assert torch.equal(head.tokenizer.encode(drawn)[0], expected)
    # Infinite noise still draws tokens that are possible.
    possible = zeros.clone()
    possible[:, [0, 1, 14, 15]] = -math.inf
    for extreme, token in ((-math.inf, 2), (math.inf, 13)):
        ends = head.sample(
            Table(possible), context(1), (1, HORIZON, ACTION_DIM), noise=torch.full((1, 4, 2), extreme)
        )
        assert (head.tokenizer.encode(ends)[0] == token).all()


def test_later_rounds_shift_the_quantiles():
    head = bins()
    quantiles = torch.tensor([[0.1, 0.7]])
    drawn = [head._choose(torch.zeros(1, 1000), quantiles, index).item() for index in range(6)]
    expected = [(quantiles[0, j % 2].item() + j // 2 * GOLDEN_RATIO) % 1.0 * 1000 for j in range(6)]
    assert all(abs(found - exact) <= 1 for found, exact in zip(drawn, expected, strict=True))


def test_fast_stops_when_every_row_is_full():
    head = fast()
    network = network_for(head)
    # One token that stands for many coefficients, wherever it is allowed.
    lengths = torch.tensor([len(piece.decode()) for piece in head.tokenizer.pieces.pieces])
    logits = torch.zeros(head.max_tokens, head.vocabulary)
    logits[:, : len(lengths)] = 10.0 * lengths
    count = 5
    assert lengths.max() > 1
    calls = []

    class Counting(Table):
        def begin(self, context):
            following = super().begin(context)
            return lambda tokens: calls.append(tokens) or following(tokens)

    drawn = attached_sample(head, Counting(logits), count)
    assert drawn.shape == (count, HORIZON, ACTION_DIM)
    assert len(calls) <= math.ceil(HORIZON * ACTION_DIM / 2)
    # Whatever a network prefers, stop included, a whole chunk comes out.
    logits[:, head.tokenizer.stop] = 1e4
    assert attached_sample(head, Table(logits), count).isfinite().all()
    attached_sample(head, network, count)
    assert 0 < network.calls < head.max_tokens


def attached_sample(head, network, count):
    return head.sample(network, context(count), (count, HORIZON, ACTION_DIM), noise=noise(count))


def test_guidance_extrapolates_the_logits():
    head = bins(temperature=0.0, drop_context=0.2)
    network = network_for(head)
    shape = (8, HORIZON, ACTION_DIM)

    class Guided(Summing):
        def begin(self, given):
            seen, hidden = super().begin(given), super().begin(given.dropped(torch.ones(8, dtype=torch.bool)))

            def following(tokens):
                without = hidden(tokens)
                return 3 * seen(tokens) - 2 * without

            return following

    by_hand = head.sample(Guided(16, head.max_tokens), context(8), shape)
    torch.testing.assert_close(head.sample(network, context(8), shape, guidance=3.0), by_hand)
    assert not torch.equal(head.sample(network, context(8), shape, guidance=1.0), by_hand)
    with pytest.raises(ValueError, match="guidance=3 needs a network that was trained with drop_context"):
        bins().sample(network, context(8), shape, guidance=3.0)


def test_dropped_contexts_train_the_network_without():
    torch.manual_seed(0)
    head, actions = bins(drop_context=0.5), chunks(200)
    network = network_for(head)
    given = head.tokenizer.encode(actions)[0]
    loss = head.loss(network, context(200), actions, everything(200))
    plain = bins()
    seen = plain.loss(network, context(200), actions, everything(200))
    unseen = plain.loss(
        network, context(200).dropped(torch.ones(200, dtype=torch.bool)), actions, everything(200)
    )
    assert given.shape == (200, head.max_tokens)
    assert ((loss == seen) | (loss == unseen)).all()
    assert 60 < (loss == unseen).sum() < 140


def test_files_restore_what_was_fitted():
    head, actions = fast(), chunks(20, seed=1)
    again = attached(Autoregressive(tokenizer=FAST(vocab_size=100)))
    again.restore(head.files())
    assert not again.needs_fit
    network = network_for(head)
    losses = [h.loss(network, context(20), actions, everything(20)) for h in (head, again)]
    assert torch.equal(*losses)
    assert bins().files() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1"),
        ({"dim_weights": [1.0, 2.0]}, "dim_weights must be null with FAST.*take head=bins"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        Autoregressive(tokenizer=FAST(), **options)


class Recurrent(nn.Module):
    def __init__(self, vocabulary: int, max_tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 64)
        self.positions = nn.Embedding(max_tokens, 64)
        self.cell = nn.GRU(64, 96, batch_first=True)
        self.out = nn.Linear(96, vocabulary)

    def forward(self, tokens, context):
        before = nn.functional.pad(self.embedding(tokens[:, :-1]), (0, 0, 1, 0))
        return self.out(self.cell(before + self.positions.weight[: tokens.shape[1]])[0])

    def begin(self, context):
        state, position = None, 0

        def following(tokens):
            nonlocal state, position
            before = torch.zeros(context, 64) if tokens is None else self.embedding(tokens)
            hidden, state = self.cell((before + self.positions.weight[position])[:, None], state)
            position += 1
            return self.out(hidden[:, 0])

        return following


def ring(count: int) -> torch.Tensor:
    """A first action on a circle of radius 0.7, and the opposite one after it."""
    angle = 2 * math.pi * torch.rand(count)
    point = 0.7 * torch.stack((angle.cos(), angle.sin()), dim=-1)
    return torch.stack((point, -point), dim=1) + 0.02 * torch.randn(count, 2, 2)


@pytest.fixture
def one_thread():
    """Layers this small only wait for each other on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "tokenizer", [Bins(num_bins=64), FAST(vocab_size=256, scale=20.0)], ids=["bins", "fast"]
)
def test_a_ring_is_learned(tokenizer):
    torch.manual_seed(0)
    head = Autoregressive(tokenizer=tokenizer)
    head.attach(horizon=2, action_dim=2)
    head.fit(ring(5000))
    network = Recurrent(head.vocabulary, head.max_tokens)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 700)
    for _ in range(700):
        optimizer.zero_grad()
        head.loss(network, None, ring(256), torch.ones(256, 2, dtype=torch.bool)).mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        drawn = head.sample(network, 4000, (4000, 2, 2), noise=torch.randn(4000, 2, 2))
    radius = drawn.norm(dim=-1)
    assert ((radius > 0.55) & (radius < 0.85)).float().mean() > 0.95
    assert (drawn.sum(1).abs() < 0.15).all(-1).float().mean() > 0.95
    angle = torch.atan2(drawn[:, 0, 1], drawn[:, 0, 0])
    shares = torch.histc(angle, bins=12, min=-math.pi, max=math.pi) / 4000
    assert (shares - 1 / 12).abs().max() < 0.03
