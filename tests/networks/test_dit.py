"""The diffusion transformer against its definition."""

from dataclasses import replace

import network_cases as cases
import torch
from torch.nn import functional

from librobot.networks.dit import DiT, DiTBlock
from librobot.nn.adaln import AdaLN

WIDTH, HEADS = 16, 2


def attention(part, queries, keys, mask):
    """Softmax attention, head by head, in plain sums."""
    q, k, v = (linear.weight.view(HEADS, -1, WIDTH) for linear in (part.q_proj, part.k_proj, part.v_proj))
    q = torch.einsum("hed,bqd->bhqe", q, queries)
    k = torch.einsum("hed,bld->bhle", k, keys)
    v = torch.einsum("hed,bld->bhle", v, keys)
    logits = torch.einsum("bhqe,bhle->bhql", q, k) / (WIDTH // HEADS) ** 0.5
    weights = logits.masked_fill(~mask[:, None, None], -torch.inf).softmax(dim=-1)
    out = torch.einsum("bhql,bhle->bqhe", weights, v)
    return out.flatten(2) @ part.o_proj.weight.T


def block(**options) -> tuple[DiTBlock, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    made = DiTBlock(WIDTH, HEADS, 32, condition_width=WIDTH, **options)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    return made, (torch.randn(2, 5, WIDTH), torch.randn(2, WIDTH), torch.randn(2, 3, WIDTH), mask)


@torch.no_grad()
def test_a_block_is_its_definition():
    made, (x, condition, context, mask) = block()
    cases.opened(made)

    def modulated(part, x):
        shift_scale_gate = part.linear.weight @ (condition * condition.sigmoid()).T
        scale, shift, gate = (shift_scale_gate.T + part.linear.bias)[:, None].split(WIDTH, dim=-1)
        centred = x - x.mean(-1, keepdim=True)
        norm = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return norm * (1 + scale) + shift, gate

    everything = torch.ones(2, 5, dtype=torch.bool)
    y, gate = modulated(made.norm_self, x)
    expected = x + gate * attention(made.self_attention, y, y, everything)
    y, gate = modulated(made.norm_cross, expected)
    expected = expected + gate * attention(made.cross_attention, y, context, mask)
    y, gate = modulated(made.norm_mlp, expected)
    first, second = (m for m in made.mlp if isinstance(m, torch.nn.Linear))
    hidden = functional.gelu(y @ first.weight.T + first.bias, approximate="tanh")
    expected = expected + gate * (hidden @ second.weight.T + second.bias)
    torch.testing.assert_close(made(x, condition, context, mask), expected, atol=1e-5, rtol=1e-5)
    assert (expected - x).abs().mean() > 0.1


@torch.no_grad()
def test_adaln_zero_starts_as_the_identity_and_adaln_does_not():
    made, inputs = block()
    assert torch.equal(made(*inputs), inputs[0])
    made, inputs = block(gated=False)
    assert (made(*inputs) - inputs[0]).abs().mean() > 0.05


@torch.no_grad()
def test_a_new_norm_is_plain_with_or_without_a_condition():
    x, condition = torch.randn(2, 3, WIDTH), torch.randn(2, 7)
    plain = functional.layer_norm(x, (WIDTH,), eps=1e-6)
    for gated, gate in ((True, 0.0), (False, 1.0)):
        y, opening = AdaLN(WIDTH, 7, gated=gated)(x, condition)
        torch.testing.assert_close(y, plain)
        assert torch.as_tensor(opening).eq(gate).all()
    y, opening = AdaLN(WIDTH, 0)(x, None)
    torch.testing.assert_close(y, plain)
    assert opening == 1.0


def test_which_blocks_attend_where():
    """GR00T: even blocks read the context, odd ones the actions."""
    alternating = DiT(sizes=cases.SIZES, width=16, num_layers=4, num_heads=2, cross_attention="alternate")
    assert [b.cross_attention is not None for b in alternating.blocks] == [True, False, True, False]
    assert [b.self_attention is not None for b in alternating.blocks] == [False, True, False, True]
    every = DiT(sizes=cases.SIZES, width=16, num_layers=2, num_heads=2)
    assert all(b.cross_attention is not None and b.self_attention is not None for b in every.blocks)


@torch.no_grad()
def test_the_pooled_context_is_the_mean_of_real_tokens():
    network = cases.build("dit", sizes=replace(cases.SIZES, takes_noise=False), pool_context=True)
    given = cases.context()
    mean = torch.stack([v[m].mean(dim=0) for v, m in zip(given.values, given.mask, strict=True)])
    expected = network.context_pool.proj(mean)
    torch.testing.assert_close(network.condition(torch.zeros(4), given), expected)


def test_dropout_is_drawn_while_training_only():
    network = cases.build("dit", dropout=0.5)
    x_t, time = cases.chunk()
    calm = [network(x_t, time, cases.context()) for _ in range(2)]
    network.train()
    drawn = [network(x_t, time, cases.context()) for _ in range(2)]
    assert torch.equal(*calm)
    assert not torch.equal(*drawn)
