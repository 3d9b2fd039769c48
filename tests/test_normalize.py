from __future__ import annotations

import copy
import io
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from librobot.data.statistics import vector_statistics
from librobot.errors import LibrobotError
from librobot.normalize import NormalizationMode, Normalizer

MODES: tuple[NormalizationMode, ...] = get_args(NormalizationMode)
VALUES = np.random.default_rng(0).normal([3.0, -100.0, 0.01], [2.0, 30.0, 0.001], size=(500, 3))


def fitted(mode: NormalizationMode, values: np.ndarray = VALUES, **options: Any) -> Normalizer:
    normalizer = Normalizer({"action": values.shape[1]}, {"action": mode}, **options)
    normalizer.fit({"action": vector_statistics(values)})
    return normalizer


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=40, deadline=None)
@given(
    offset=st.floats(-1e3, 1e3),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**32 - 1),
    shape=st.lists(st.integers(1, 3), max_size=3),
    outside=st.floats(0, 20),
)
def test_round_trip(
    mode: NormalizationMode, offset: float, scale: float, seed: int, shape: list[int], outside: float
) -> None:
    """Of any values, those outside of the statistics too: nothing is clipped."""
    generator = np.random.default_rng(seed)
    normalizer = fitted(mode, generator.normal(offset, scale, size=(20, 4)))
    x = torch.from_numpy(generator.normal(offset, scale * (1 + outside), size=(*shape, 4))).float()
    y = normalizer.normalize("action", x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    back = normalizer.unnormalize("action", y)
    # float32: each of the few operations is off by at most half a unit in the last place of its operands.
    bound = 1e-6 * (x.abs() + abs(offset) + 100 * scale)
    assert ((back - x).abs() <= bound).all()


def test_mean_std_standardises() -> None:
    y = fitted("mean_std").normalize("action", torch.from_numpy(VALUES))
    torch.testing.assert_close(y.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(3, dtype=torch.float64), atol=1e-4, rtol=0)


def test_min_max_fills_the_interval() -> None:
    y = fitted("min_max").normalize("action", torch.from_numpy(VALUES))
    torch.testing.assert_close(y.amin(0), -torch.ones(3, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.amax(0), torch.ones(3, dtype=torch.float64), atol=1e-4, rtol=0)


def test_quantile_leaves_the_tails_outside() -> None:
    y = fitted("quantile").normalize("action", torch.from_numpy(VALUES)).numpy()
    np.testing.assert_allclose(np.quantile(y, 0.01, axis=0), -1, atol=1e-4)
    np.testing.assert_allclose(np.quantile(y, 0.99, axis=0), 1, atol=1e-4)
    assert (y.max(axis=0) > 1.05).all()


def test_identity_changes_nothing_and_needs_no_statistics() -> None:
    normalizer = Normalizer({"action": 3}, {"action": "identity"})
    normalizer.fit({})
    x = torch.from_numpy(VALUES)
    assert torch.equal(normalizer.normalize("action", x), x)
    assert torch.equal(normalizer.unnormalize("action", x), x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_constant_dimensions_do_not_blow_up(mode: NormalizationMode, noise: float) -> None:
    values = VALUES.copy()
    values[:, 1] = 0.25 + noise * np.random.default_rng(1).normal(size=len(values))
    normalizer = fitted(mode, values)
    x = torch.from_numpy(values).float()
    y = normalizer.normalize("action", x)
    assert (y[:, 1].abs() <= (0.2501 if mode == "identity" else 1e-4)).all()
    # A policy's small error in the normalised value must stay a small error of the action.
    back = normalizer.unnormalize("action", y + 0.01)
    torch.testing.assert_close(back[:, 1], x[:, 1] + 0.01, atol=1e-5, rtol=0)


def test_quantile_of_a_gripper_that_is_nearly_always_open() -> None:
    values = np.ones((1000, 1))
    values[:5] = 0
    y = fitted("quantile", values).normalize("action", torch.tensor([[0.0], [1.0]]))
    assert y.tolist() == [[-1.0], [1.0]]


def test_each_key_has_its_own_mode() -> None:
    normalizer = Normalizer({"state": 3, "action": 3}, {"state": "mean_std", "action": "min_max"})
    statistics = vector_statistics(VALUES)
    normalizer.fit({"state": statistics, "action": statistics})
    x = torch.from_numpy(statistics["max"])
    torch.testing.assert_close(normalizer.normalize("action", x), torch.ones_like(x), atol=1e-4, rtol=0)
    assert (normalizer.normalize("state", x) > 2).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["normalize", "unnormalize"])
def test_it_refuses_to_run_unfitted(mode: NormalizationMode, method: str) -> None:
    normalizer = Normalizer({"action": 3}, {"action": mode})
    assert not normalizer.fitted
    with pytest.raises(LibrobotError, match="no statistics yet"):
        getattr(normalizer, method)("action", torch.zeros(2, 3))


def test_it_refuses_a_second_fit() -> None:
    normalizer = fitted("mean_std")
    before = copy.deepcopy(normalizer.state_dict())
    with pytest.raises(LibrobotError, match="holds statistics already"):
        normalizer.fit({"action": vector_statistics(VALUES + 1)})
    torch.testing.assert_close(normalizer.state_dict(), before, atol=0, rtol=0)
    normalizer.fit({"action": vector_statistics(VALUES + 1)}, force=True)
    torch.testing.assert_close(normalizer.state_dict()["action_offset"], before["action_offset"] + 1)


@pytest.mark.parametrize("mode", MODES)
def test_statistics_survive_a_checkpoint(mode: NormalizationMode) -> None:
    normalizer = fitted(mode)
    file = io.BytesIO()
    torch.save(normalizer.state_dict(), file)
    file.seek(0)
    fresh = Normalizer({"action": 3}, {"action": mode})
    fresh.load_state_dict(torch.load(file, weights_only=True))
    x = torch.from_numpy(VALUES).float()
    assert torch.equal(fresh.normalize("action", x), normalizer.normalize("action", x))
    with pytest.raises(LibrobotError, match="holds statistics already"):
        fresh.fit({"action": vector_statistics(VALUES)})


def test_loading_an_unfitted_state_makes_it_unfitted() -> None:
    normalizer = fitted("mean_std")
    normalizer.normalize("action", torch.zeros(3))
    normalizer.load_state_dict(Normalizer({"action": 3}, {"action": "mean_std"}).state_dict())
    with pytest.raises(LibrobotError, match="no statistics yet"):
        normalizer.normalize("action", torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_statistics_stay_exact_in_any_precision(dtype: torch.dtype) -> None:
    normalizer, exact = fitted("mean_std"), fitted("mean_std").state_dict()
    torch.nn.Sequential(normalizer).to(dtype)
    torch.testing.assert_close(normalizer.state_dict(), exact, atol=0, rtol=0)
    assert normalizer.normalize("action", torch.zeros(3, dtype=dtype)).dtype == dtype


def test_no_dimensions() -> None:
    normalizer = fitted("min_max", np.zeros((5, 0)))
    assert normalizer.normalize("action", torch.zeros(2, 0)).shape == (2, 0)


@pytest.mark.parametrize(
    ("statistics", "part"),
    [
        ({"actions": {}}, "no statistics for 'action': did you mean 'actions'?"),
        (
            {"action": {"mean": np.zeros(2), "std": np.ones(3)}},
            "'mean' must hold 3 finite values, found shape (2,)",
        ),
        (
            {"action": {"mean": np.zeros(3), "std": np.array([1, np.nan, 1])}},
            "'std' must hold 3 finite values",
        ),
        ({"action": {"mean": np.zeros(3)}}, "'std' must hold 3 finite values"),
    ],
)
def test_statistics_that_do_not_fit(statistics: Any, part: str) -> None:
    normalizer = Normalizer({"action": 3}, {"action": "mean_std"})
    with pytest.raises(LibrobotError) as error:
        normalizer.fit(statistics)
    assert part in str(error.value)
    assert not normalizer.fitted


def test_wrong_use() -> None:
    normalizer = fitted("mean_std")
    with pytest.raises(LibrobotError, match="does not know 'actoin': did you mean 'action'"):
        normalizer.normalize("actoin", torch.zeros(3))
    with pytest.raises(LibrobotError, match=r"action has 3 dimensions, found a tensor of shape \(2, 1\)"):
        normalizer.unnormalize("action", torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("modes", "part"),
    [
        ({"action": "mean_sdt"}, "did you mean 'mean_std'"),
        ({"action": "mean_std", "stat": "min_max"}, "normalization of 'stat'"),
        ({}, "no mode for action"),
    ],
)
def test_bad_arguments(modes: Any, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        Normalizer({"action": 3}, modes)
    with pytest.raises(ValueError, match="minimum_spread"):
        Normalizer({"action": 3}, {"action": "mean_std"}, minimum_spread=0)


def test_each_step_has_its_own_statistics() -> None:
    """Relative actions spread along a chunk: [0, 2], then [-2, 2], which the third step shares."""
    normalizer = Normalizer({"action": 2}, {"action": "min_max"})
    normalizer.by_step("action", 3)
    normalizer.fit(
        {"action": {"min": np.array([[0.0, 0.0], [-2.0, 0.0]]), "max": np.array([[2.0, 8.0], [2.0, 8.0]])}}
    )
    actions = torch.tensor([[[2.0, 4.0], [1.0, 0.0], [-1.0, 8.0]]])
    expected = torch.tensor([[[1.0, 0.0], [0.5, -1.0], [-0.5, 1.0]]])
    assert torch.equal(normalizer.normalize("action", actions), expected)
    assert torch.equal(normalizer.unnormalize("action", expected), actions)
    assert torch.equal(normalizer.normalize("action", actions[:, :2]), expected[:, :2])
    with pytest.raises(LibrobotError, match=r"statistics of 3 steps, found a tensor of shape \(1, 4, 2\)"):
        normalizer.normalize("action", torch.zeros(1, 4, 2))


def test_one_statistic_is_every_steps_and_robots_have_their_own() -> None:
    normalizer = Normalizer({"action": 2}, {"action": "mean_std"}, embodiments=2)
    normalizer.by_step("action", 2)
    normalizer.fit(
        [
            {"action": {"mean": np.array([1.0, 2.0]), "std": np.array([2.0, 4.0])}},
            {"action": {"mean": np.array([[1.0], [3.0]]), "std": np.array([[1.0], [2.0]])}},
        ]
    )
    actions = torch.tensor([[[3.0, 2.0], [3.0, 2.0]], [[3.0, 2.0], [3.0, 2.0]]])
    found = normalizer.normalize("action", actions, torch.tensor([0, 1]))
    assert torch.equal(found, torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[2.0, 2.0], [0.0, 2.0]]]))
    assert torch.equal(normalizer.unnormalize("action", found, torch.tensor([0, 1])), actions)
    other = Normalizer({"action": 2}, {"action": "mean_std"}, embodiments=2)
    other.by_step("action", 2)
    other.load_state_dict(normalizer.state_dict())
    assert torch.equal(other.normalize("action", actions, torch.tensor([0, 1])), found)
