"""Batches of samples of like length: counts of padding, nothing lost, the same order every time."""

import numpy as np
import pytest
import torch

import tiny_models
from librobot.data.buckets import LengthBuckets, padding


def shuffled(epoch):
    return np.random.default_rng([5, epoch]).permutation(1004)


def test_padding_falls_below_a_twentieth_and_no_sample_is_lost():
    random = np.random.default_rng(0)
    lengths = np.stack([random.choice([9, 12, 31], 1004), random.integers(20, 90, 1004)], axis=1)
    buckets = LengthBuckets(shuffled, lengths, batch=8, window=64, seed=1)
    first, second = buckets.indices(0), buckets.indices(1)
    assert padding(lengths, shuffled(0), 8) > 0.3
    assert padding(lengths, first, 8) < 0.05
    assert sorted(first) == sorted(second) == list(range(1004))
    assert (first[-4:] == shuffled(0)[-4:]).all()  # no whole batch
    assert (first != second).mean() > 0.9
    assert (buckets.indices(0) == first).all()
    means = lengths[first[:1000]].sum(axis=1).reshape(-1, 8).mean(axis=1)
    assert (np.diff(means[:60]) < 0).any()  # not from short to long


def test_padding_by_hand():
    lengths = np.array([[1, 2], [3, 2], [3, 5], [3, 5]])
    assert padding(lengths, np.arange(4), 2) == pytest.approx(1 - 24 / 26)


@pytest.mark.parametrize("name", ["pi0_fast", "rt2", "openvla"])
def test_padding_changes_no_samples_loss_and_lengths_are_those_of_the_tokens(name):
    framework = tiny_models.build(name).eval()
    data = tiny_models.batch(horizon=framework.horizon)
    lengths = framework.token_lengths(data.observation.prompt, data.observation.state, data.actions)
    assert len(set(lengths[:, 0].tolist())) > 1
    assert (len(set(lengths[:, 1].tolist())) > 1) == (name == "pi0_fast")
    inputs = framework.prepare(data.observation).inputs
    counted = inputs["token_mask"].sum(dim=1).numpy()
    assert (np.diff(counted) == np.diff(lengths[:, 0])).all()  # special tokens are the same for all
    if name == "openvla":
        return  # which crops, and whose loss is one for all
    alone = []
    for i in range(4):
        one = tiny_models.batch(horizon=framework.horizon)
        keep = slice(i, i + 1)
        one.observation.images = {n: x[keep] for n, x in one.observation.images.items()}
        one.observation.image_mask = {n: x[keep] for n, x in one.observation.image_mask.items()}
        one.observation.state, one.observation.prompt = (
            one.observation.state[keep],
            one.observation.prompt[keep],
        )
        one.actions, one.action_mask = one.actions[keep], one.action_mask[keep]
        alone.append(one)
    with torch.no_grad():
        each = torch.stack([framework.compute_loss(one)[0] for one in alone])
        together = framework.compute_loss(data)[0]
    counts = data.action_mask.sum(dim=1).float() if name == "rt2" else torch.ones(4)
    assert float((each * counts).sum() / counts.sum() - together) == pytest.approx(0, abs=1e-5)
