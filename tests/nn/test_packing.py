"""Rows that hold several samples: who goes where, who sees whom, and how little is left empty."""

import numpy as np
import pytest
import torch

from librobot.nn.attention import Attention, block_mask, with_self
from librobot.nn.packing import choose_rows, first_fit_decreasing, pack, packed_mask, plan_packing, unpack
from librobot.nn.positions import rotary_angles


def mask_of(lengths, width=None):
    return torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]


def test_first_fit_decreasing_by_hand():
    row, offset = first_fit_decreasing([2, 6, 3, 1], 6)
    assert row == [1, 0, 1, 1]
    assert offset == [3, 0, 0, 5]


def test_every_real_token_has_its_place_and_comes_back():
    mask = mask_of([4, 6, 1, 3], 8)
    mask[1, 2] = False  # a hole, such as an absent camera's tokens
    packing = plan_packing(mask, length=6)
    x = torch.arange(mask.numel()).reshape(mask.shape)
    packed = pack(x, packing)
    real = packing.sample >= 0
    assert sorted(packed[real].tolist()) == sorted(x[mask].tolist())
    assert torch.equal(packed[real] // 8, packing.sample[real])
    assert torch.equal(unpack(packed, packing)[mask], x[mask])
    assert packing.padding == pytest.approx(1 - 13 / packing.source.numel())
    for sample in range(4):  # a sample's tokens stay in their order, in one row
        rows, columns = (packing.sample == sample).nonzero(as_tuple=True)
        assert len(set(rows.tolist())) == 1
        assert (columns.diff() == 1).all()


def test_a_sample_sees_itself_alone_by_hand():
    packing = plan_packing(mask_of([3, 2]), length=6)
    blocks = torch.tensor([[0, 0, 1], [0, 1, 2]])  # a prefix of two, then one; causal
    seen = packed_mask(packing, blocks)[0].int().tolist()
    assert seen == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


@pytest.mark.parametrize("length", [None, 1, 9, 40])
def test_packed_attention_is_that_of_the_padded_rows(length):
    torch.manual_seed(0)
    lengths = [9, 2, 5, 5, 1, 7]
    mask = mask_of(lengths)
    x = torch.randn(6, 9, 16, dtype=torch.float64, requires_grad=True)
    attention = Attention(16, 4, 2, 4).double()
    blocks, positions = torch.arange(9).clamp_min(3).expand(6, -1), mask.cumsum(1) - 1

    def over(rows, where, seen):
        angles = rotary_angles(where, 4)
        return attention(rows, angles, *attention.keys_values(rows, angles), seen)

    padded = over(x, positions, with_self(block_mask(blocks, blocks, mask)))
    packing = plan_packing(mask, length)
    packed = over(pack(x, packing), pack(positions, packing), packed_mask(packing, blocks))
    assert packing.source.shape[1] >= max(9, min(length or 0, sum(lengths)))
    assert (unpack(packed, packing) - padded)[mask].abs().max() < 1e-12
    wanted = torch.randn(int(mask.sum()), 16, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((y[mask] * wanted).sum(), x)[0] for y in (padded, unpack(packed, packing))
    ]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12


def realistic(random, batch, picture):
    """Prompts of three instructions, answers of 20 to 110 FAST tokens, a second camera that a third lacks."""
    prompts, answers = random.choice([14, 22, 48], batch), random.integers(20, 110, batch)
    return prompts + picture * (1 + (random.random(batch) > 1 / 3)), answers


@pytest.mark.parametrize("picture", [0, 16, 256])
@pytest.mark.parametrize("batch", [8, 32, 128])
def test_at_most_a_twentieth_is_padding(batch, picture):
    """Padded rows hold the longest prefix and the longest answer of their batch."""
    random = np.random.default_rng(batch)
    before, after = [], []
    for _ in range(20):
        prefixes, answers = realistic(random, batch, picture)
        lengths = prefixes + answers
        longest = prefixes.max() + answers.max()  # an absent camera's tokens are padding
        before.append(1 - lengths.sum() / (batch * longest))
        packing = plan_packing(mask_of(lengths.tolist()))
        after.append(packing.padding)
        assert len(set(packing.sample.flatten().tolist()) - {-1}) == batch
    assert max(after) <= 0.05 + 1e-9
    assert np.mean(before) >= (0.2 if picture == 256 else 0.3)


def test_rows_are_no_longer_than_they_must_be():
    assert max(choose_rows([8] * 16, None)[0]) == 15  # nothing to gain
    row, _ = choose_rows([9, 7, 6, 10, 8, 8, 9, 7], None)  # none fits behind another: pairs of 16
    assert max(row) == 3
    with pytest.raises(ValueError, match="length must be at least 1 token, found 0"):
        plan_packing(mask_of([3]), length=0)
