"""ALiBi and M-RoPE against their papers and transformers' own code."""

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_multimodal_rotary_pos_emb

from librobot.nn.alibi import alibi_bias, alibi_slopes
from librobot.nn.multimodal_rotary import multimodal_rotary_angles
from librobot.nn.positions import apply_rotary, rotary_angles


def test_slopes_of_the_paper():
    """Section 3: 8 heads have 1/2 .. 1/256, and 16 heads 2^-0.5 .. 2^-8."""
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    torch.testing.assert_close(alibi_slopes(16), torch.tensor([2.0 ** (-i / 2) for i in range(1, 17)]))
    with pytest.raises(ValueError, match="num_heads must be at least 1, found 0"):
        alibi_slopes(0)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 6, 8, 12, 14, 20, 32])
def test_slopes_for_any_number_of_heads_are_blooms(num_heads):
    """Bloom adds slope * key position, which differs from -slope * distance by a constant for each query."""
    length = 5
    theirs = build_alibi_tensor(torch.ones(1, length, dtype=torch.long), num_heads, torch.float32)
    place = torch.arange(length)[None]
    ours = alibi_bias(num_heads, place, place)[0]
    for query in range(length):
        relative = theirs[:, 0, : query + 1] - theirs[:, 0, query : query + 1]
        torch.testing.assert_close(ours[:, query, : query + 1], relative, atol=1e-6, rtol=1e-6)


def test_alibi_depends_on_distance_only():
    queries, keys = torch.tensor([[3, 7], [0, 1]]), torch.tensor([[0, 3, 9], [5, 1, 2]])
    bias = alibi_bias(3, queries, keys)
    assert bias.shape == (2, 3, 2, 3)
    assert torch.equal(alibi_bias(3, queries + 11, keys + 11), bias)
    assert torch.equal(bias[0, :, 0, 1], torch.zeros(3))
    slopes = [1 / 16, 1 / 256, 1 / 4]
    torch.testing.assert_close(bias[0, :, 1, 0], torch.tensor([-7 * slope for slope in slopes]))
    torch.testing.assert_close(bias[1, :, 0, 0], torch.tensor([-5 * slope for slope in slopes]))


SECTIONS = [2, 3, 3]


def random_positions(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 40, (3, 2, 7), generator=torch.Generator().manual_seed(seed))


def test_multimodal_rotary_is_transformers():
    torch.manual_seed(0)
    q, k, where = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16), random_positions()
    frequency = 1.0 / 1e6 ** (torch.arange(0, 16, 2).float() / 16)
    angles = where[..., None].float() * frequency
    tables = torch.cat((angles, angles), dim=-1)  # (3, b, l, e), as Qwen2VLRotaryEmbedding gives them
    theirs = apply_multimodal_rotary_pos_emb(q, k, tables.cos(), tables.sin(), SECTIONS)
    ours = multimodal_rotary_angles(where, 16, SECTIONS, theta=1e6)
    for x, expected in zip((q, k), theirs, strict=True):
        assert (apply_rotary(x, ours) - expected).abs().max() <= 1e-6


def test_text_has_plain_rotary_positions():
    where = random_positions()[0]
    found = multimodal_rotary_angles(where.expand(3, -1, -1), 16, SECTIONS)
    for ours, plain in zip(found, rotary_angles(where, 16), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=0)


def logits(q, k, where):
    tables = multimodal_rotary_angles(where, 16, SECTIONS)
    return apply_rotary(q, tables) @ apply_rotary(k, tables).transpose(-1, -2)


def test_only_differences_count_along_each_axis():
    torch.manual_seed(0)
    q, k, where = torch.randn(2, 1, 7, 16), torch.randn(2, 1, 7, 16), random_positions()
    before = logits(q, k, where)
    shift = torch.tensor([5, 2, 9])[:, None, None]
    torch.testing.assert_close(logits(q, k, where + shift), before, atol=1e-4, rtol=0)
    for axis in range(3):
        moved = where.clone()
        moved[axis, :, 0] += 3  # one token alone
        assert (logits(q, k, moved)[..., 0, 1:] - before[..., 0, 1:]).abs().max() > 1e-3


def test_rotation_keeps_lengths_and_position_zero():
    torch.manual_seed(0)
    x = torch.randn(2, 1, 7, 16)
    turned = apply_rotary(x, multimodal_rotary_angles(random_positions(), 16, SECTIONS))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    zero = multimodal_rotary_angles(torch.zeros(3, 2, 7, dtype=torch.long), 16, SECTIONS)
    torch.testing.assert_close(apply_rotary(x, zero), x)


@pytest.mark.parametrize("sections", [[2, 3, 2], [4, 4], [8]])
def test_sections_must_fill_half_the_head(sections):
    with pytest.raises(ValueError, match="half of head_dim=16, found"):
        multimodal_rotary_angles(random_positions(), 16, sections)
