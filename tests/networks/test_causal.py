"""The causal decoder: who sees whom, and that decoding step by step computes the same."""

import network_cases as cases
import pytest
import torch
from network_cases import SIZES


def tokens(size: int = 4) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randint(SIZES.vocabulary, (size, SIZES.max_tokens), generator=draw)


@torch.no_grad()
def test_steps_give_what_the_whole_gives():
    network, given, chosen = cases.build("causal", num_layers=3), cases.context(), tokens()
    whole = network(chosen, given)
    following = network.begin(given)
    stepwise = [following(None), *(following(chosen[:, i]) for i in range(SIZES.max_tokens - 1))]
    assert (torch.stack(stepwise, dim=1) - whole).abs().max() <= 1e-5
    assert whole.std() > 0.1


@torch.no_grad()
def test_the_context_is_read_once():
    network, chosen = cases.build("causal"), tokens()
    calls = []
    for layer in network.layers:
        layer.cross_attention.k_proj.register_forward_hook(lambda *_: calls.append("cross"))
        layer.self_attention.k_proj.register_forward_hook(lambda _, x, y: calls.append(x[0].shape[1]))
    following = network.begin(cases.context())
    assert calls == ["cross"] * len(network.layers)
    following(None)
    following(chosen[:, 0])
    following(chosen[:, 1])
    assert calls[len(network.layers) :] == [1] * 3 * len(network.layers), "one new token at a time"


@torch.no_grad()
def test_logits_depend_on_the_tokens_before_alone():
    network, given, chosen = cases.build("causal"), cases.context(), tokens()
    before = network(chosen, given)
    for j in range(SIZES.max_tokens):
        changed = chosen.clone()
        changed[:, j] = (changed[:, j] + 1) % SIZES.vocabulary
        difference = (network(changed, given) - before).abs().amax(dim=-1)
        assert (difference[:, : j + 1] < 1e-6).all()
        assert (difference[:, j + 1 :] > 1e-5).all()


@torch.no_grad()
def test_order_counts():
    """Rotary positions tell apart what attention without them cannot: the order of earlier tokens."""
    network, given, chosen = cases.build("causal", num_layers=1), cases.context(), tokens()
    chosen[:, :3] = torch.tensor([1, 2, 3])
    swapped = chosen.clone()
    swapped[:, :2] = torch.tensor([2, 1])
    assert (network(swapped, given) - network(chosen, given))[:, 3].abs().amax(dim=-1).min() > 1e-5


@torch.no_grad()
def test_the_order_of_context_tokens_does_not_count():
    network, given, chosen = cases.build("causal"), cases.context(), tokens()
    flipped = cases.ContextTokens(given.values.flip(1), given.mask.flip(1), given.features, given.null)
    torch.testing.assert_close(network(chosen, flipped), network(chosen, given), atol=1e-5, rtol=1e-4)


def test_what_cannot_be_decoded():
    network, given = cases.build("causal"), cases.context()
    with pytest.raises(ValueError, match=r"at most 7.*found 8"):
        network(torch.zeros(4, 8, dtype=torch.long), given)
    with pytest.raises(ValueError, match=r"None at first.*found tokens at step 0"):
        network.begin(given)(torch.zeros(4, dtype=torch.long))
    following = network.begin(given)
    following(None)
    with pytest.raises(ValueError, match="found None at step 1"):
        following(None)


def test_it_learns_a_sequence_that_the_context_names():
    """Two contexts, two sequences: after training, greedy decoding repeats them."""
    torch.manual_seed(0)
    network = cases.build("causal", num_layers=1).train()
    given, target = cases.context(2, 1), tokens(2)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        logits = network(target, given)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
        optimizer.step()
    network.eval()
    following, chosen, last = network.begin(given), [], None
    for _ in range(SIZES.max_tokens):
        last = following(last).argmax(dim=-1)
        chosen.append(last)
    assert torch.equal(torch.stack(chosen, dim=1), target)
