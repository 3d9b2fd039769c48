"""Masks cell by cell, and attention under any of them against plain einsum."""

import math

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from librobot.nn import masks, positions
from librobot.nn.attention import Attention
from librobot.nn.cross_attention import CrossAttention, CrossAttentionBlock

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def drawn(*rows: str) -> torch.Tensor:
    return torch.tensor([[cell == "x" for cell in row.split()] for row in rows])


def cells(mask, *arguments) -> torch.Tensor:
    """The mask between the positions 0 .. 4."""
    place = torch.arange(5)[None]
    return mask(place, place, *arguments)[0]


def test_each_mask_cell_by_cell():
    causal = drawn("x . . . .", "x x . . .", "x x x . .", "x x x x .", "x x x x x")
    window = drawn("x x . . .", "x x x . .", ". x x x .", ". . x x x", ". . . x x")
    sinks = drawn(*["x . . . ."] * 5)
    blocks = drawn("x x . . .", "x x . . .", "x x x x .", "x x x x .", "x x x x x")
    assert torch.equal(cells(masks.causal), causal)
    assert torch.equal(cells(masks.sliding_window, 2), window)
    assert torch.equal(cells(masks.attention_sinks, 1), sinks)
    assert torch.equal(cells(masks.block_wise, 2), blocks)
    streaming = drawn("x . . . .", "x x . . .", "x x x . .", "x . x x .", "x . . x x")
    assert torch.equal(causal & (window | sinks), streaming)


def test_masks_go_by_position_not_by_place():
    """Two samples that are counted differently, a query that comes after cached keys."""
    queries, keys = torch.tensor([[4], [1]]), torch.tensor([[2, 3, 4, 5], [0, 1, 2, 3]])
    assert torch.equal(masks.causal(queries, keys)[:, 0], drawn("x x x .", "x x . ."))
    assert torch.equal(masks.sliding_window(queries, keys, 2)[:, 0], drawn(". x x x", "x x x ."))
    assert torch.equal(masks.attention_sinks(queries, keys, 1)[:, 0], drawn(". . . .", "x . . ."))
    assert torch.equal(masks.block_wise(queries, keys, 2)[:, 0], drawn("x x x x", "x x . ."))


@pytest.mark.parametrize("name", ["sliding_window", "attention_sinks", "block_wise"])
def test_sizes_are_at_least_one(name):
    with pytest.raises(ValueError, match="at least 1, found 0"):
        cells(getattr(masks, name), 0)


def plain(queries, keys, values, visible, bias=0.0):
    """softmax(q k / sqrt(e) + bias) v over the visible keys, in float64; zeros where none is."""
    queries, keys, values = queries.double(), keys.double(), values.double()
    logits = torch.einsum("bhqe,bhle->bhql", queries, keys) / math.sqrt(queries.shape[-1]) + bias
    weights = logits.masked_fill(~visible[:, None], -math.inf).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    return rearrange(torch.einsum("bhql,bhle->bhqe", weights, values), "b h q e -> b q (h e)")


def assert_close(found, expected):
    assert (found.double() - expected).abs().max() <= TOLERANCE[found.dtype] * (1 + expected.abs().max())


SIZES = st.tuples(*(st.integers(1, top) for top in (3, 7, 9, 3, 4)))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SIZES, DTYPES, st.floats(0, 1), st.booleans(), st.booleans(), st.integers(0, 99))
def test_cross_attention_is_plain_attention(sizes, dtype, density, with_mask, with_bias, seed):
    b, q, length, h, half = sizes
    draw = torch.manual_seed(seed)
    layer = CrossAttention(h * 2 * half, h).to(dtype)
    x, context = (torch.randn(b, n, h * 2 * half, generator=draw).to(dtype) for n in (q, length))
    mask = torch.rand(b, q, length, generator=draw) < density if with_mask else None
    bias = torch.randn(b, h, q, length, generator=draw).to(dtype) if with_bias else None
    with torch.no_grad():
        out = layer(x, context, mask=mask, bias=bias)
        assert out.dtype == dtype
        projected = (layer.q_proj(x), layer.k_proj(context), layer.v_proj(context))
        heads = (rearrange(y, "b l (h e) -> b h l e", h=h) for y in projected)
        visible = torch.ones(b, q, length, dtype=torch.bool) if mask is None else mask
        read = plain(*heads, visible, 0.0 if bias is None else bias.double())
        assert_close(out, read @ layer.o_proj.weight.double().T)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SIZES, DTYPES, st.floats(0, 1), st.sampled_from([1, 2]), st.integers(0, 99))
def test_rotary_attention_is_plain_attention(sizes, dtype, density, group, seed):
    """Queries at the end of the keys' sequence, key-value heads shared by `group` query heads."""
    b, q, extra, h, half = sizes
    draw = torch.manual_seed(seed)
    width, length = 6, q + extra
    layer = Attention(width, h * group, h, 2 * half).to(dtype)
    x = torch.randn(b, length, width, generator=draw).to(dtype)
    mask = torch.rand(b, q, length, generator=draw) < density
    mask[..., -1] = True  # every query has to see something
    angles = positions.rotary_angles(torch.arange(length).expand(b, length), 2 * half)
    last = tuple(table[:, :, -q:] for table in angles)
    with torch.no_grad():
        keys, values = layer.keys_values(x, angles)
        out = layer(x[:, -q:], last, keys, values, mask)
        assert out.dtype == dtype
        queries = rearrange(layer.q_proj(x[:, -q:]), "b q (h e) -> b h q e", e=2 * half)
        first, second = queries.float().chunk(2, dim=-1)
        cos, sin = (table.chunk(2, dim=-1)[0] for table in last)
        queries = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(dtype)
        keys, values = (y[:, torch.arange(h * group) // group] for y in (keys, values))
        read = plain(queries, keys, values, mask)
        assert_close(out, read @ layer.o_proj.weight.double().T)


def test_what_is_hidden_gets_no_gradient_and_a_blind_query_none():
    torch.manual_seed(0)
    layer, x = CrossAttention(8, 2), torch.randn(2, 3, 8)
    context = torch.randn(2, 4, 8, requires_grad=True)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[0, :, 2] = False
    mask[1] = False
    out = layer(x, context, mask=mask)
    assert (out[1] == 0).all()
    out.square().sum().backward()
    assert (context.grad[0, 2] == 0).all()
    assert (context.grad[0, 1] != 0).all()
    assert (context.grad[1] == 0).all()


def test_a_block_is_two_residual_branches_behind_gates():
    torch.manual_seed(0)
    block, x, context = CrossAttentionBlock(8, 2, 12, gated=True), torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    assert torch.equal(block(x, context), x)
    with torch.no_grad():
        block.gates.copy_(torch.tensor([0.5, -0.3]))
    norm = torch.nn.functional.layer_norm
    middle = x + math.tanh(0.5) * block.attention(norm(x, (8,)), norm(context, (8,)))
    expected = middle + math.tanh(-0.3) * block.mlp(norm(middle, (8,)))
    torch.testing.assert_close(block(x, context), expected)
    ungated = CrossAttentionBlock(8, 2, 12)
    ungated.load_state_dict({k: v for k, v in block.state_dict().items() if k != "gates"})
    middle = x + block.attention(norm(x, (8,)), norm(context, (8,)))
    torch.testing.assert_close(ungated(x, context), middle + block.mlp(norm(middle, (8,))))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads must divide the width of 8, found 3"):
        CrossAttention(8, 3)
