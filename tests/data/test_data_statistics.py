from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from librobot.data import statistics
from librobot.data.sources.lerobot import LeRobotSource
from librobot.data.statistics import (
    FEW,
    QUANTILES,
    image_statistics,
    kept_statistics,
    merge_statistics,
    quantiles,
    sample_frames,
    vector_statistics,
)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(1, 60),
    dims=st.integers(0, 5),
    scale=st.floats(1e-3, 1e5),
)
def test_vectors_equal_numpy(seed: int, length: int, dims: int, scale: float) -> None:
    """Written out with sorting and sums, not with the functions that it calls itself."""
    values = (np.random.default_rng(seed).normal(size=(length, dims)) * scale).astype(np.float32)
    found = vector_statistics(values)
    exact = np.sort(values.astype(np.float64), axis=0)
    mean = exact.sum(axis=0) / length
    expected = {"min": exact[0], "max": exact[-1], "mean": mean}
    expected["std"] = np.sqrt(((exact - mean) ** 2).sum(axis=0) / length)
    for name, q in {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}.items():
        place = q * (length - 1)
        low = int(place)
        high = min(low + 1, length - 1)
        expected[name] = exact[low] + (place - low) * (exact[high] - exact[low])
    assert set(found) == set(expected)
    for name, value in found.items():
        assert value.shape == (dims,)
        assert value.dtype == np.float64
        np.testing.assert_allclose(value, expected[name], rtol=1e-9, atol=1e-9 * scale, err_msg=name)


@pytest.mark.parametrize("length", [1, 2, 4999, FEW - 1, FEW, 50_001])
def test_quantiles_are_those_of_numpy_to_the_last_bit(length: int) -> None:
    generator = np.random.default_rng(length)
    smooth = generator.normal(size=length)
    for values in (
        smooth.astype(np.float32).astype(np.float64),
        smooth,  # finer than the cells' numbers
        smooth * 1e300,  # beyond them
        smooth * 1e-320,
        np.round(smooth) + 0.0,
        np.full(length, -0.25),
        np.where(smooth > 2, np.inf, smooth),
        np.where(smooth == smooth.max(), np.nan, smooth),
    ):
        for shares in (list(QUANTILES.values()), [0.0, 1.0, 0.5, *generator.random(4)]):
            with np.errstate(invalid="ignore"):
                found, expected = quantiles(values, shares), np.quantile(values, shares)
            np.testing.assert_array_equal(found, expected)


def test_large_offsets_keep_their_spread() -> None:
    """float32 sums would lose it."""
    values = 1e4 + np.random.default_rng(0).normal(size=(5000, 1)).astype(np.float32)
    assert vector_statistics(values.astype(np.float32))["std"][0] == pytest.approx(1, abs=0.05)


def test_a_source_gives_the_statistics_of_every_frame(
    image_dataset: Path, episodes: list[dict[str, Any]]
) -> None:
    found = LeRobotSource(image_dataset).statistics()
    assert set(found) == {"state", "action"}
    for key, part in found.items():
        written = np.concatenate([episode[key] for episode in episodes]).astype(np.float64)
        np.testing.assert_allclose(part["mean"], np.mean(written, axis=0), rtol=1e-9)
        np.testing.assert_allclose(part["std"], np.std(written, axis=0), rtol=1e-9)
        np.testing.assert_allclose(part["q99"], np.percentile(written, 99, axis=0), rtol=1e-9)


def test_merged_episodes_are_the_whole() -> None:
    values = np.random.default_rng(3).normal([0, 5, -2], [1, 0.1, 30], size=(900, 3))
    parts = [
        vector_statistics(part) | {"count": np.array([len(part)])}
        for part in np.split(values, [100, 101, 400])
    ]
    merged, whole = merge_statistics(parts), vector_statistics(values)
    assert merged["count"].tolist() == [900]
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(merged[name], whole[name], rtol=1e-10, atol=1e-12)
    # The format's own approximation: means of the episodes' quantiles.
    np.testing.assert_allclose(merged["q50"], whole["q50"], atol=0.2 * whole["std"].max())


def test_pixels_equal_numpy() -> None:
    images = np.random.default_rng(4).integers(0, 200, (12, 20, 30, 3), np.uint8)
    images[..., 1] //= 2
    found = image_statistics(images)
    pixels = images.reshape(-1, 3) / 255
    for name, expected in {
        "min": pixels.min(axis=0),
        "max": pixels.max(axis=0),
        "mean": pixels.mean(axis=0),
        "std": pixels.std(axis=0),
        **{name: np.quantile(pixels, q, axis=0) for name, q in QUANTILES.items()},
    }.items():
        assert found[name].shape == (3, 1, 1)
        # A quantile is one of the 256 levels.
        tolerance = 1 / 255 if name in QUANTILES else 1e-9
        np.testing.assert_allclose(found[name].reshape(3), expected, atol=tolerance, err_msg=name)
    assert found["count"].tolist() == [12]


def test_large_images_are_thinned() -> None:
    columns = np.arange(600) * 255 // 599
    images = np.broadcast_to(columns[None, None, :, None], (3, 400, 600, 3)).astype(np.uint8)
    found = image_statistics(images)
    np.testing.assert_allclose(found["mean"], 0.5, atol=0.01)
    np.testing.assert_allclose(found["std"], 1 / np.sqrt(12), atol=0.01)


@pytest.mark.parametrize(("length", "count"), [(1, 1), (40, 40), (100, 100), (400, 100), (10_000, 1000)])
def test_sampled_frames(length: int, count: int) -> None:
    frames = sample_frames(length)
    assert len(frames) == count
    assert frames[0] == 0
    assert frames[-1] == length - 1
    assert (np.diff(frames) > 0).all()
    assert np.diff(frames).max(initial=1) <= length / count + 2


def test_lerobot_computes_the_same() -> None:
    compute = pytest.importorskip("lerobot.datasets.compute_stats")
    values = np.random.default_rng(5).normal([0.0, 50.0], [1.0, 9.0], size=(400, 2)).astype(np.float32)
    theirs, ours = compute.get_feature_stats(values, axis=0, keepdims=False), vector_statistics(values)
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(theirs[name].reshape(2), ours[name], rtol=1e-4, atol=1e-5)
    for name in QUANTILES:  # lerobot reads them off a histogram
        np.testing.assert_allclose(theirs[name].reshape(2), ours[name], atol=0.05 * 9)


def test_no_video_is_decoded(video_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("librobot.data.video_column.VideoReader", None)
    source = LeRobotSource(video_dataset)
    assert source.statistics()["action"]["q99"].shape == (2,)
    with pytest.raises(TypeError):
        source.images(np.array([0]))


def test_those_of_many_values_are_kept_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "LARGE", 100)
    values = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    first = kept_statistics(values, tmp_path)
    (path,) = tmp_path.iterdir()
    for name, value in vector_statistics(values).items():
        np.testing.assert_array_equal(first[name], value)
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "vector_statistics", None)
        again = kept_statistics(values.copy(), tmp_path)
    for name, value in first.items():
        np.testing.assert_array_equal(again[name], value)
    path.write_text("{")
    np.testing.assert_array_equal(kept_statistics(values, tmp_path)["q01"], first["q01"])
    kept_statistics(values + 1, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    kept_statistics(values[:40], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
