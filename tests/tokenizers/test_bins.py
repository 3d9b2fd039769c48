"""Bins against examples by hand and numpy's own binning, and a language model's tokens for them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from librobot.tokenizers.bins import Bins, BinsToVocabulary

EDGES = np.linspace(-1, 1, 256)
CENTRES = (EDGES[:-1] + EDGES[1:]) / 2


def made(horizon=1, action_dim=1, **options) -> Bins:
    bins = Bins(**options)
    bins.attach(horizon=horizon, action_dim=action_dim)
    return bins


def encoded(bins: Bins, *values: float) -> list[int]:
    return bins.encode(torch.tensor(values)[:, None, None])[0][:, 0].tolist()


def decoded(bins: Bins, *ids: int) -> torch.Tensor:
    column = torch.tensor(ids)[:, None]
    return bins.decode(column, torch.ones_like(column, dtype=torch.bool))[:, 0, 0]


def test_uniform_bins_by_hand():
    bins = made()
    # Each bin is 2 / 256 wide and holds its lower edge.
    assert encoded(bins, -1.0, -1 + 2 / 256, 0.0, -1e-4, 1.0 - 1e-4, 1.0) == [0, 1, 128, 127, 255, 255]
    assert encoded(bins, -7.0, 7.0) == [0, 255]
    torch.testing.assert_close(decoded(bins, 0, 128, 255), torch.tensor([-255.0, 1.0, 255.0]) / 256)


def test_openvla_bins_by_hand():
    bins = made(convention="openvla")
    # The middle of 255 bins holds zero; 1 itself is beyond the last edge.
    assert encoded(bins, -1.0, -3.0, 0.0, 0.999, 1.0, 2.0) == [0, 0, 127, 254, 255, 255]
    torch.testing.assert_close(
        decoded(bins, 0, 127, 254, 255), torch.tensor([-254.0, 0.0, 254.0, 254.0]) / 255
    )


def test_openvla_bins_are_numpys():
    values = np.random.default_rng(0).uniform(-1.1, 1.1, 5000)
    digits = np.digitize(values.clip(-1, 1), EDGES)
    bins = made(horizon=1000, action_dim=5, convention="openvla")
    ids, mask = bins.encode(torch.from_numpy(values).view(1, 1000, 5))
    places = BinsToVocabulary.last(32000).to_vocabulary(ids)
    assert np.array_equal(places[0].numpy(), 32000 - digits)
    expected = CENTRES[(32000 - places[0].numpy() - 1).clip(0, 254)]
    assert np.abs(bins.decode(ids, mask).flatten().numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("convention", ["uniform", "openvla"])
def test_a_round_trip_loses_half_a_bin(convention):
    bins = made(horizon=50, action_dim=3, num_bins=16, low=-2.0, high=1.0, convention=convention)
    actions = torch.rand(4, 50, 3, generator=torch.Generator().manual_seed(0)) * 3 - 2
    width = 3 / (16 if convention == "uniform" else 15)
    error = (bins.decode(*bins.encode(actions)) - actions).abs()
    assert 0.4 * width < error.max() <= width / 2 + 1e-6


def test_tokens_stand_step_by_step():
    bins = made(horizon=2, action_dim=3)
    actions = torch.tensor([[[-0.9, -0.5, 0.0], [0.1, 0.5, 0.9]]])
    ids, mask = bins.encode(actions)
    assert ids.shape == (1, 6)
    assert mask.all()
    assert (ids.diff() > 0).all()


@given(st.lists(st.integers(-1000, 1000), max_size=9), st.data())
def test_any_tokens_decode(ids, data):
    mask = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    bins = made(horizon=2, action_dim=3)
    actions = bins.decode(torch.tensor([ids], dtype=torch.long), torch.tensor([mask], dtype=torch.bool))
    assert actions.shape == (1, 2, 3)
    assert actions.abs().max() < 1


def test_the_last_tokens_of_a_vocabulary():
    places = BinsToVocabulary.last(32000)
    assert places.to_vocabulary(torch.tensor([0, 1, 255])).tolist() == [31999, 31998, 31744]
    assert places.to_bins(torch.tensor([31999, 31998, 31744, 5, 40000])).tolist() == [0, 1, 255, 255, 0]


def test_the_integers_own_tokens():
    places = BinsToVocabulary.integers(lambda text: [1000 - 3 * int(text)], num_bins=100)
    assert places.to_vocabulary(torch.tensor([[0, 99]])).tolist() == [[1000, 703]]
    every = torch.arange(100)
    assert torch.equal(places.to_bins(places.to_vocabulary(every)), every)
    with pytest.raises(ValueError, match=r"one token for every integer.*found \[1, 0\] for 10"):
        BinsToVocabulary.integers(lambda text: [int(digit) for digit in text])


def test_the_least_used_tokens():
    places = BinsToVocabulary.least_used(torch.tensor([5, 0, 9, 0, 1, 7]), num_bins=4)
    assert places.to_vocabulary(torch.arange(4)).tolist() == [1, 3, 4, 0]
    assert places.to_bins(torch.tensor([0, 4, 3, 1])).tolist() == [3, 2, 1, 0]
    with pytest.raises(ValueError, match="counts must cover at least 256 tokens, found 6"):
        BinsToVocabulary.least_used(torch.zeros(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"convention": "rt3"}, "convention must be one of"),
        ({"num_bins": 1}, "num_bins must be at least 2"),
        ({"low": 1.0}, "low must be below high"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        Bins(**options)
