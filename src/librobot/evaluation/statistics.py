"""What a set of episodes says: success with its uncertainty, lengths, latency. Plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from librobot.evaluation.episode import EpisodeResult, PolicyCall

Z_95 = 1.959963984540054  # the normal distribution's 97.5% quantile


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927, "Probable inference", equation for p).

    The values of p at which the observed share lies z standard errors away:
    (p_hat + z^2/2n +- z sqrt(p_hat (1 - p_hat)/n + z^2/4n^2)) / (1 + z^2/n). Unlike the normal
    approximation it stays within [0, 1] and has a width at 0% and 100%. (0, 1) without trials.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be between 0 and {trials}, found {successes}")
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    scale = 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2)) / scale
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


def summarise(episodes: Sequence[EpisodeResult]) -> dict[str, Any]:
    """Overall success, and success and lengths (in control steps) per kind, in the episodes' order of kinds.

    "success" is the share over all episodes; every kind has an equal share of them.
    """
    kinds = list(dict.fromkeys(episode.kind for episode in episodes))
    tasks = {kind: _group([e for e in episodes if e.kind == kind]) for kind in kinds}
    return _group(episodes) | {"tasks": tasks}


def _group(episodes: Sequence[EpisodeResult]) -> dict[str, Any]:
    successes = sum(episode.success for episode in episodes)
    return {
        "success": successes / len(episodes) if episodes else 0.0,
        "successes": successes,
        "episodes": len(episodes),
        "interval": list(wilson_interval(successes, len(episodes))),
        "mean_length": _mean([e.length for e in episodes]),
        "mean_length_of_successes": _mean([e.length for e in episodes if e.success]),
        "max_length": max((e.length for e in episodes), default=0),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def latency(calls: Sequence[PolicyCall]) -> dict[str, Any] | None:
    """Milliseconds of one policy call (one batch) and of one chunk (the call shared over its batch).

    None where no policy was called (the scripted expert). The first call is left out where there are more:
    it pays for warming up.
    """
    warm = calls[1:] or calls
    if not warm:
        return None
    seconds = np.array([call.seconds for call in warm])
    sizes = np.array([call.batch_size for call in warm])
    p50, p95 = np.percentile(1000 * seconds, [50, 95])
    return {
        "calls": len(calls),
        "batch_size": {"mean": float(sizes.mean()), "max": int(sizes.max())},
        "call_ms": {"p50": float(p50), "p95": float(p95)},
        "chunk_ms": {"mean": float(1000 * seconds.sum() / sizes.sum())},
    }
