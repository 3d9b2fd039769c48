"""From chunks to executed actions."""

import numpy as np
import pytest

from librobot.chunking import ChunkExecutor, TemporalEnsemble


def test_receding_horizon():
    chunk = np.arange(8.0).reshape(4, 2)
    np.testing.assert_array_equal(ChunkExecutor(4).add(chunk), chunk)
    np.testing.assert_array_equal(ChunkExecutor(4, execute_steps=3).add(chunk), chunk[:3])


def test_ensemble_is_the_weighted_mean_over_all_chunks():
    """Against the published form: a table of all predictions for every step, oldest first."""
    draw = np.random.default_rng(0)
    chunks = draw.normal(size=(9, 4, 2))
    executor = ChunkExecutor(4, ensemble=0.3)
    for now in range(9):
        opinions = [chunks[then][now - then] for then in range(now + 1) if now - then < 4]
        weights = np.exp(-0.3 * np.arange(len(opinions)))
        expected = (weights[:, None] * np.array(opinions)).sum(0) / weights.sum()
        got = executor.add(chunks[now])
        assert got.shape == (1, 2)
        np.testing.assert_allclose(got[0], expected)


def test_the_oldest_opinion_weighs_most_and_reset_forgets():
    ensemble = TemporalEnsemble(decay=1.0)
    ensemble.add(np.zeros((2, 1)))
    assert ensemble.add(np.ones((2, 1)))[0] < 0.5
    ensemble.reset()
    assert ensemble.add(np.ones((2, 1)))[0] == 1.0


def test_actions_keep_their_type():
    assert ChunkExecutor(2, ensemble=0.01).add(np.zeros((2, 3), np.float32)).dtype == np.float32


@pytest.mark.parametrize("arguments", [{"execute_steps": 0}, {"execute_steps": 5}])
def test_bad_number_of_steps(arguments):
    with pytest.raises(ValueError, match="execute_steps"):
        ChunkExecutor(4, **arguments)


def test_ensembling_asks_at_every_step():
    with pytest.raises(ValueError, match="every step"):
        ChunkExecutor(4, execute_steps=2, ensemble=0.01)
