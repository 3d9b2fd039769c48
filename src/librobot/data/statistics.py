"""Statistics of states, actions and images: exact for vectors, from histograms for pixels."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from librobot.data.files import write_json

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def vector_statistics(values: Float[np.ndarray, "n dim"]) -> dict[str, Float[np.ndarray, " dim"]]:
    """mean, std (over n, not n - 1), min, max and quantiles per dimension, in float64; n must be above 0.

    One dimension after another, so that the copy in float64 takes 8 n bytes.
    """
    found: dict[str, list[float]] = {name: [] for name in ("min", "max", "mean", "std", *QUANTILES)}
    for column in values.T:
        exact = np.ascontiguousarray(column, np.float64)
        each = (exact.min(), exact.max(), exact.mean(), exact.std(), *quantiles(exact, QUANTILES.values()))
        for name, value in zip(found, each, strict=True):
            found[name].append(float(value))
    return {name: np.array(column, np.float64) for name, column in found.items()}


def quantiles(values: Float[np.ndarray, " n"], shares: Iterable[float]) -> Float[np.ndarray, " q"]:
    """`np.quantile` to the last bit (linear between two values), of many values twice as fast and more."""
    places = np.array(list(shares)) * (len(values) - 1)
    if np.isnan(values.min()):
        return np.full(len(places), np.nan)
    below = np.floor(places).astype(np.int64)
    low, high = values_at(values, np.stack([below, np.minimum(below + 1, len(values) - 1)]))
    share, step = places - below, high - low
    return np.where(share < 0.5, low + step * share, high - step * (1 - share))


CELLS = 2**16
FEW = 2**13
"""Values that are sorted faster than the cells are gone through."""


def values_at(values: Float[np.ndarray, " n"], ranks: Int[np.ndarray, "*q"]) -> Float[np.ndarray, "*q"]:
    """`np.sort(values)[ranks]`: a histogram says in which of its cells the ranks lie, and only these are
    sorted.

    The cell is the upper half of the value as float32, whose bits, read as a whole number, ascend with the
    value (IEEE 754; those of negative numbers, sign apart, descend).
    """
    if len(values) < FEW:
        return np.sort(values)[ranks]
    with np.errstate(over="ignore"):
        bits = values.astype(np.float32).view(np.int32)
    cells = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> 16) + CELLS // 2
    counts = np.bincount(cells, minlength=CELLS)
    ends = np.cumsum(counts)
    chosen = np.searchsorted(ends, ranks, side="right")
    wanted = np.zeros(CELLS, bool)
    wanted[chosen] = True
    left_out = np.cumsum(np.where(wanted, 0, counts))
    return np.sort(values[wanted[cells]])[ranks - left_out[chosen]]


LARGE = 2**21
"""Values from which on statistics are kept: below, they take less than half a second."""


def kept_statistics(values: Float[np.ndarray, "n dim"], folder: Path) -> dict[str, np.ndarray]:
    """`vector_statistics`, kept in `folder` under the content of `values` where these are many."""
    if values.size < LARGE:
        return vector_statistics(values)
    digest = hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=10)
    digest.update(repr((values.shape, values.dtype.str)).encode())
    path = folder / f"{digest.hexdigest()}.json"
    if path.exists():
        with contextlib.suppress(ValueError):  # damaged: made again
            return {name: np.array(value) for name, value in json.loads(path.read_text()).items()}
    found = vector_statistics(values)
    write_json(path, {name: value.tolist() for name, value in found.items()})
    return found


def sample_frames(length: int) -> Int[np.ndarray, " n"]:
    """Which frames of an episode the image statistics look at: n^0.75, between 100 and 10 000 (or all)."""
    count = max(min(100, length), min(int(length**0.75), 10_000))
    return np.round(np.linspace(0, length - 1, count)).astype(int)


def image_statistics(images: UInt8[np.ndarray, "t h w 3"]) -> dict[str, Float[np.ndarray, "3 1 1"]]:
    """Statistics per colour in [0, 1], of some frames; images of 300 pixels and more are thinned to about
    150.

    A uint8 channel has 256 values, so one histogram gives every statistic exactly.
    """
    frames = images[sample_frames(len(images))]
    longest = max(frames.shape[1:3])
    stride = longest // 150 if longest >= 300 else 1
    pixels = frames[:, ::stride, ::stride].reshape(-1, 3)
    levels = np.arange(256) / 255
    per_channel: list[dict[str, float]] = []
    for channel in range(3):
        histogram = np.bincount(pixels[:, channel], minlength=256)
        seen = np.flatnonzero(histogram)
        share = histogram / histogram.sum()
        mean = float(share @ levels)
        cumulative = np.cumsum(share)
        per_channel.append(
            {
                "min": levels[seen[0]],
                "max": levels[seen[-1]],
                "mean": mean,
                "std": float(np.sqrt(share @ (levels - mean) ** 2)),
                **{
                    name: levels[min(255, int(np.searchsorted(cumulative, q)))]
                    for name, q in QUANTILES.items()
                },
            }
        )
    statistics = {
        name: np.array([channel[name] for channel in per_channel]).reshape(3, 1, 1) for name in per_channel[0]
    }
    return statistics | {"count": np.array([len(frames)])}


def merge_statistics(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Statistics of several episodes together: exact but for the quantiles, which are means weighted by
    count."""
    counts = np.array([int(part["count"][0]) for part in parts], dtype=np.float64)
    weights = counts / counts.sum()

    def weighted(name: str) -> np.ndarray:
        return np.tensordot(weights, np.stack([part[name] for part in parts]), axes=1)

    mean = weighted("mean")
    spread = np.stack([part["std"] ** 2 + (part["mean"] - mean) ** 2 for part in parts])
    return {
        "min": np.min([part["min"] for part in parts], axis=0),
        "max": np.max([part["max"] for part in parts], axis=0),
        "mean": mean,
        "std": np.sqrt(np.tensordot(weights, spread, axes=1)),
        "count": np.array([int(counts.sum())]),
        **{name: weighted(name) for name in QUANTILES},
    }
