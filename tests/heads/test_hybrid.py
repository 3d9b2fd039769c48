"""Two heads over one context: weights, insulation, delegation."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from librobot.heads.base import ActionHead
from librobot.heads.flow_matching import FlowMatching
from librobot.heads.hybrid import Hybrid
from librobot.heads.regression import L1

CONF = Path(__file__).parents[2] / "conf" / "head" / "hybrid.yaml"


class Tokens(ActionHead):
    """A token head's double: one token for each number, its sign."""

    network = "decoder"
    generative = False
    vocabulary = 2
    max_tokens = 8
    learned = ""

    @property
    def needs_fit(self):
        return not self.learned

    def fit(self, actions):
        self.learned = f"{actions.shape}"

    def files(self):
        return {"signs": self.learned}

    def restore(self, files):
        self.learned = files["signs"]

    def loss(self, network, context, actions, mask, *, noise=None, time=None):
        tokens = (actions > 0).long().flatten(1)
        logits = network(tokens, context)
        error = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        visible = mask.repeat_interleave(actions.shape[2], dim=1)
        return (error.view_as(tokens) * visible).sum(1) / visible.sum(1)

    def sample(self, network, context, shape, *, noise=None, num_steps=None, guidance=None):
        self.no_guidance(guidance)
        return network(None, context).argmax(-1).view(shape) * 2.0 - 1


def attached(**options) -> Hybrid:
    head = Hybrid(**({"flow": FlowMatching(), "tokens": Tokens()} | options))
    head.attach(horizon=4, action_dim=2)
    return head


def network():
    """Both read the context (b, 2), by sums so that every number of it has a gradient."""
    return {
        "denoiser": lambda x_t, time, context: torch.tanh(x_t * context.sum(1)[:, None, None]),
        "decoder": lambda tokens, context: (context[:, None] * torch.arange(1.0, 9.0)[:, None]).sin(),
    }


def inputs():
    draw = torch.Generator().manual_seed(0)
    actions, noise = torch.randn(2, 3, 4, 2, generator=draw)
    context = torch.randn(3, 2, generator=draw, requires_grad=True)
    return actions, noise, torch.tensor([0.2, 0.5, 0.9]), context, torch.ones(3, 4, dtype=torch.bool)


def test_the_loss_is_the_weighted_sum():
    actions, noise, time, context, mask = inputs()
    mask[1, 2:] = False
    head = attached(flow_weight=3.0, token_weight=0.5)
    flow = head.flow.loss(network()["denoiser"], context, actions, mask, noise=noise, time=time)
    tokens = head.tokens.loss(network()["decoder"], context, actions, mask)
    found = head.loss(network(), context, actions, mask, noise=noise, time=time)
    torch.testing.assert_close(found, 3.0 * flow + 0.5 * tokens)


def gradient(**options):
    actions, noise, time, context, mask = inputs()
    loss = attached(**options).loss(network(), context, actions, mask, noise=noise, time=time)
    return torch.autograd.grad(loss.sum(), context)[0]


def test_insulation_stops_the_flow_losss_gradient_and_no_other():
    actions, _, _, context, mask = inputs()
    tokens = Tokens().loss(network()["decoder"], context, actions, mask)
    alone = torch.autograd.grad(tokens.sum(), context)[0]
    assert (alone != 0).all()
    assert torch.equal(gradient(insulate=True), alone)
    assert torch.equal(gradient(insulate=True, flow_weight=100.0), alone)
    assert ((gradient(insulate=False) - alone).abs() > 1e-4).any()


def test_insulation_leaves_the_denoisers_own_gradient():
    actions, noise, time, context, mask = inputs()
    weight = torch.ones(2, requires_grad=True)
    both = network() | {"denoiser": lambda x_t, time, context: x_t * weight}
    attached().loss(both, context, actions, mask, noise=noise, time=time).sum().backward()
    assert (weight.grad != 0).all()


def test_a_context_that_cannot_be_insulated_is_refused():
    actions, _, _, _, mask = inputs()
    with pytest.raises(ValueError, match=r"insulate needs a context with detach\(\).*'?dict"):
        attached().loss(network(), {}, actions, mask)


def test_sampling_is_the_named_heads():
    _, noise, _, context, _ = inputs()
    seen = []
    both = network()
    counted = both | {"denoiser": lambda *given: seen.append(1) or both["denoiser"](*given)}
    flow, tokens = attached(), attached(sample_from="tokens")
    drawn = flow.sample(counted, context, (3, 4, 2), noise=noise, num_steps=3)
    assert len(seen) == 3
    expected = FlowMatching().sample(both["denoiser"], context, (3, 4, 2), noise=noise, num_steps=3)
    assert torch.equal(drawn, expected)
    drawn = tokens.sample(counted, context, (3, 4, 2), noise=noise)
    assert torch.equal(drawn, tokens.tokens.sample(both["decoder"], context, (3, 4, 2)))
    assert len(seen) == 3
    assert flow.stochastic
    assert not attached(flow=L1()).stochastic
    with pytest.raises(ValueError, match="guidance=2"):
        tokens.sample(counted, context, (3, 4, 2), guidance=2.0)


def test_sizes_and_kind_are_the_nested_heads():
    head = attached()
    assert (head.network, head.output_width, head.vocabulary, head.max_tokens) == ("pair", 2, 2, 8)
    assert head.generative
    assert not attached(flow=L1()).generative


def test_what_is_fitted_survives_by_files():
    head = attached()
    assert head.needs_fit
    head.fit(torch.zeros(5, 4, 2))
    assert not head.needs_fit
    files = head.files()
    assert list(files) == ["tokens.signs"]
    again = attached()
    again.restore(files)
    assert again.files() == files
    assert not again.needs_fit


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"flow": Tokens()}, "flow must be a head over a denoiser, found Tokens"),
        ({"tokens": L1()}, "tokens must be a head over a decoder, found L1"),
        ({"flow_weight": 0.0}, "flow_weight"),
        ({"token_weight": -1.0}, "token_weight"),
        ({"sample_from": "decoder"}, "sample_from"),
    ],
    ids=str,
)
def test_bad_arguments(bad, words):
    with pytest.raises(ValueError, match=words):
        Hybrid(**({"flow": FlowMatching(), "tokens": Tokens()} | bad))


def test_the_yaml_trains_fast_tokens_beside_the_flow():
    """Built as the configuration says: fitted, trained one step, sampled from both, restored."""
    torch.manual_seed(0)
    node = OmegaConf.load(CONF)
    node.tokens.tokenizer.vocab_size = 300
    heads = [instantiate(node, _convert_="all") for _ in range(2)]
    for head in heads:
        head.attach(horizon=4, action_dim=2)
    fitted, restored = heads
    assert fitted.needs_fit
    actions = torch.randn(64, 4, 2).clamp(-1, 1)
    fitted.fit(actions)
    restored.restore(fitted.files())
    assert not restored.needs_fit
    table = torch.randn(fitted.vocabulary, requires_grad=True)

    class Decoder:
        def __call__(self, tokens, context):
            return table.expand(*tokens.shape, -1) * context.mean()

        def begin(self, context):
            return lambda tokens: table.expand(3, -1) * context.mean()

    both = {"denoiser": network()["denoiser"], "decoder": Decoder()}
    _, noise, time, context, mask = inputs()
    loss = restored.loss(both, context, actions[:3], mask, noise=noise, time=time)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert (table.grad != 0).any()
    for part in ("flow", "tokens"):
        restored.sample_from = part
        with torch.no_grad():
            drawn = restored.sample(both, context, (3, 4, 2), noise=noise)
        assert drawn.shape == (3, 4, 2)
        assert drawn.isfinite().all()
