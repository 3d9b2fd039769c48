import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from librobot.evaluation.episode import EpisodeResult, PolicyCall
from librobot.evaluation.statistics import Z_95, latency, summarise, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),  # upper end in closed form: z^2 / (n + z^2)
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_known_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_no_trials_say_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_ends_solve_the_score_equation(counts):
    """Wilson's ends are the p with |p_hat - p| = z sqrt(p (1 - p) / n): checked against that definition."""
    successes, trials = counts
    share = successes / trials
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        assert abs(share - end) == pytest.approx(Z_95 * math.sqrt(end * (1 - end) / trials), abs=1e-9)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_mirrored_and_narrower_with_more_trials(counts):
    successes, trials = counts
    low, high = wilson_interval(successes, trials)
    mirrored = wilson_interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)
    more = wilson_interval(4 * successes, 4 * trials)
    assert more[1] - more[0] < high - low


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="between 0 and 3"):
        wilson_interval(4, 3)


def episode(index, kind, success, length):
    return EpisodeResult(index, kind, 1_000_000 + index, f"{kind} it", success, length)


def test_summary_by_kind():
    episodes = [episode(0, "reach", True, 10), episode(1, "push", False, 50), episode(2, "reach", True, 20)]
    summary = summarise(episodes)
    assert summary["success"] == pytest.approx(2 / 3)
    assert summary["episodes"] == 3
    assert summary["interval"] == pytest.approx(wilson_interval(2, 3))
    assert list(summary["tasks"]) == ["reach", "push"]
    reach, push = summary["tasks"].values()
    assert (reach["success"], reach["episodes"], reach["mean_length"]) == (1.0, 2, 15.0)
    assert (push["success"], push["mean_length"], push["mean_length_of_successes"]) == (0.0, 50.0, None)


def test_latency_leaves_the_first_call_out():
    calls = [PolicyCall(2, 9.0), PolicyCall(4, 0.010), PolicyCall(2, 0.020), PolicyCall(2, 0.030)]
    found = latency(calls)
    assert found["calls"] == 4
    assert found["call_ms"]["p50"] == pytest.approx(20.0)
    assert found["call_ms"]["p95"] == pytest.approx(29.0)
    assert found["chunk_ms"]["mean"] == pytest.approx(60 / 8)
    assert found["batch_size"] == {"mean": pytest.approx(8 / 3), "max": 4}


def test_latency_without_a_policy_is_none():
    assert latency([]) is None
