"""What several observation steps become, against recurrences and convolutions written out."""

import copy

import pytest
import torch
from hydra.utils import instantiate
from torch.nn import functional

import tiny_models
from librobot.nn import history_encoders
from librobot.nn.alibi import alibi_bias
from librobot.nn.positions import age_embedding

WIDTH, STEPS, PLACES = 16, 4, 3
SUMMARIES = [name for name in tiny_models.options("history") if name != "concatenate"]


def built(name: str, obs_steps: int = STEPS, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    node = tiny_models.node("history", name, **{"inner_width": 8} if name in SUMMARIES else {})
    return instantiate(node | changes)(width=WIDTH, obs_steps=obs_steps).eval()


def tokens(obs_steps: int = STEPS, **kind) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(2, obs_steps, PLACES, WIDTH, generator=draw).to(**kind)


@pytest.mark.parametrize("obs_steps", [1, STEPS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", tiny_models.options("history"))
def test_every_option_keeps_places_apart_and_trains(name, dtype, obs_steps):
    encoder, x = built(name, obs_steps).to(dtype), tokens(obs_steps, dtype=dtype).requires_grad_()
    out = encoder(x)
    assert out.dtype == dtype
    assert out.shape == (2, PLACES * (obs_steps if name == "concatenate" else 1), WIDTH)
    changed = x.clone()
    changed[0, :, 1] = 5.0
    moved = (encoder(changed) != out).any(-1)
    assert not moved[1].any()
    assert moved[0].nonzero().flatten().remainder(PLACES).unique().tolist() == [1]
    out.float().square().sum().backward()
    assert (x.grad[:, -1] != 0).any(dim=-1).all()
    if obs_steps > 1:
        assert all((parameter.grad != 0).any() for parameter in encoder.parameters())


@pytest.mark.parametrize("name", SUMMARIES)
def test_every_summary_reads_all_steps_and_their_order(name):
    encoder, x = built(name), tokens()
    x.requires_grad_()
    encoder(x).square().sum().backward()
    assert (x.grad.abs().amax(dim=(0, 2, 3)) > 1e-6).all()
    swapped = x[:, [1, 0, 2, 3]]
    assert (encoder(swapped) - encoder(x)).abs().max() > 1e-5


@pytest.mark.parametrize("name", tiny_models.options("history"))
def test_a_copy_and_a_state_dict_give_the_same(name):
    encoder, x = built(name), tokens()
    other = built(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other(x), encoder(x))
    assert torch.equal(copy.deepcopy(encoder)(x), encoder(x))


def test_concatenate_keeps_everything():
    out = built("concatenate")(tokens()).unflatten(1, (STEPS, PLACES))
    torch.testing.assert_close(out - age_embedding(STEPS, WIDTH)[:, None], tokens())
    assert torch.equal(out[:, -1], tokens()[:, -1])


def test_the_lstm_is_the_recurrence():
    encoder, x = built("lstm", num_layers=1), tokens()
    weights = encoder.lstm
    h = c = torch.zeros(2, PLACES, 8)
    for t in range(STEPS):
        gates = x[:, t] @ weights.weight_ih_l0.T + h @ weights.weight_hh_l0.T
        i, f, g, o = (gates + weights.bias_ih_l0 + weights.bias_hh_l0).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    expected = x[:, -1] + encoder.project(h)
    torch.testing.assert_close(encoder(x), expected, atol=1e-5, rtol=1e-5)


def test_the_convolutions_are_causal_sums():
    """relu(shortcut(x_t) + f(f(x))_t), where f(x)_t = relu(sum_j w_j x_(t - dilation (k - 1 - j)) + b)."""
    kernel_size, num_blocks = 2, 3
    encoder = built("temporal_convolution", kernel_size=kernel_size, num_blocks=num_blocks)
    x = tokens()

    def convolve(x, convolution, dilation):
        out = []
        for t in range(STEPS):
            total = convolution.bias
            for j in range(kernel_size):
                source = t - dilation * (kernel_size - 1 - j)
                if source >= 0:
                    total = total + x[:, source] @ convolution.weight[..., j].T
            out.append(functional.relu(total).expand(2, PLACES, -1))
        return torch.stack(out, dim=1)

    y = x
    for number, block in enumerate(encoder.blocks):
        shortcut = y
        if not number:
            shortcut = y @ block.shortcut.weight[..., 0].T + block.shortcut.bias
        inner = convolve(convolve(y, block.first, 2**number), block.second, 2**number)
        y = functional.relu(shortcut + inner)
    expected = x[:, -1] + encoder.project(y[:, -1])
    torch.testing.assert_close(encoder(x), expected, atol=1e-5, rtol=1e-5)


def test_the_convolutions_reach_is_as_stated():
    """1 + 2 (k - 1) (2^blocks - 1) steps count, and not one more."""
    reach = 1 + 2 * (2 - 1) * (2**2 - 1)
    torch.manual_seed(0)
    encoder = history_encoders.TemporalConvolution(
        width=WIDTH, obs_steps=reach, inner_width=64, num_blocks=2, kernel_size=2
    )
    x = torch.randn(4, reach + 2, PLACES, WIDTH, requires_grad=True)
    encoder(x).square().sum().backward()
    seen = x.grad.abs().amax(dim=(0, 2, 3)) > 0
    assert seen.tolist() == [False, False] + [True] * reach
    with pytest.raises(ValueError, match=f"reach back {reach} steps, which must be at least obs_steps=8"):
        built("temporal_convolution", 8, num_blocks=2, kernel_size=2)


@pytest.mark.parametrize("positions", ["age", "alibi"])
def test_the_transformer_is_causal_attention_over_steps(positions):
    """One layer in plain einsum, each step seeing the earlier ones."""
    encoder, x = built("transformer", num_layers=1, num_heads=2, positions=positions), tokens()
    (block,) = encoder.layers
    y = encoder.enter(x.transpose(1, 2))  # (b, n, t, e)
    if positions == "age":
        y = y + age_embedding(STEPS, 8)
    attention = block.attention
    q = attention.q_proj(block.norm_x(y)).unflatten(-1, (2, 4))
    normed = block.norm_context(y)
    k, v = (project(normed).unflatten(-1, (2, 4)) for project in (attention.k_proj, attention.v_proj))
    logits = torch.einsum("bnqhe,bnlhe->bnhql", q, k) / 2
    if positions == "alibi":
        step = torch.arange(STEPS)[None]
        logits = logits + alibi_bias(2, step, step)
    past = torch.ones(STEPS, STEPS, dtype=torch.bool).tril()
    weights = logits.masked_fill(~past, -torch.inf).softmax(-1)
    y = y + attention.o_proj(torch.einsum("bnhql,bnlhe->bnqhe", weights, v).flatten(-2))
    y = y + block.mlp(block.norm_mlp(y))
    expected = x[:, -1] + encoder.project(encoder.norm(y[:, :, -1]))
    torch.testing.assert_close(encoder(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({}, [True] * 6),
        ({"window": 2}, [False, False, False, True, True, True]),
        ({"window": 2, "num_sinks": 1}, [True, False, False, True, True, True]),
    ],
)
def test_the_window_bounds_what_a_transformer_sees(changes, seen):
    """Two layers of window 2 look back two steps; a sink is seen by all."""
    encoder = built("transformer", 6, num_layers=2, **changes)
    x = tokens(6).requires_grad_()
    encoder(x).square().sum().backward()
    assert (x.grad.abs().amax(dim=(0, 2, 3)) > 0).tolist() == seen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "rope"}, "positions must be one of .*found 'rope'"),
        ({"num_sinks": 1}, "num_sinks=1 needs a window"),
        ({"window": 0}, "window must be at least 1, found 0"),
        ({"num_heads": 3}, "num_heads must divide"),
    ],
)
def test_the_transformer_refuses_nonsense(changes, message):
    with pytest.raises(ValueError, match=message):
        history_encoders.Transformer(width=WIDTH, obs_steps=STEPS, inner_width=8, **changes)
