"""From chunks of predicted actions to the actions that are executed. numpy only, one robot at a time."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


class TemporalEnsemble:
    """Averages what successive chunks say about the same moment (Zhao et al. 2023, algorithm 2).

    One chunk comes per control step. The i-th oldest opinion about now weighs exp(-decay * i), the oldest
    most; weights are normalised over the opinions at hand. A larger `decay` trusts older chunks more.
    """

    def __init__(self, decay: float = 0.01) -> None:
        self.decay = decay
        self.reset()

    def reset(self) -> None:
        self._chunks: list[np.ndarray] = []

    def add(self, chunk: Float[np.ndarray, "k a"]) -> Float[np.ndarray, " a"]:
        """Take the chunk predicted now, and return the action for now."""
        self._chunks.append(np.asarray(chunk))
        # The chunk that came `age` steps ago speaks of now in its row `age`; older ones have run out.
        self._chunks = [c for age, c in zip(self._ages(), self._chunks, strict=True) if age < len(c)]
        opinions = np.stack([c[age] for age, c in zip(self._ages(), self._chunks, strict=True)])
        weights = np.exp(-self.decay * np.arange(len(opinions)))
        return (weights[:, None] * opinions).sum(axis=0).astype(opinions.dtype) / weights.sum().astype(
            opinions.dtype
        )

    def _ages(self) -> range:
        return range(len(self._chunks) - 1, -1, -1)


class ChunkExecutor:
    """Decides which actions of a chunk run before the policy is asked again.

    `execute_steps` actions of each chunk run open loop (receding horizon; None means the whole chunk). With
    `ensemble` (a decay, 0.01 in ACT) the policy is asked at every step and the chunks are averaged.
    """

    def __init__(self, horizon: int, execute_steps: int | None = None, ensemble: float | None = None) -> None:
        if execute_steps is not None and not 1 <= execute_steps <= horizon:
            raise ValueError(
                f"execute_steps must lie between 1 and the policy's horizon {horizon}, found {execute_steps}"
            )
        if ensemble is not None and execute_steps not in (None, 1):
            raise ValueError(
                f"temporal ensembling asks the policy at every step: leave execute_steps unset (or 1), "
                f"found {execute_steps}"
            )
        self.execute_steps = 1 if ensemble is not None else (execute_steps or horizon)
        self._ensemble = None if ensemble is None else TemporalEnsemble(ensemble)

    def reset(self) -> None:
        """Forget the past: a new episode begins."""
        if self._ensemble is not None:
            self._ensemble.reset()

    def add(self, chunk: Float[np.ndarray, "k a"]) -> Float[np.ndarray, "n a"]:
        """The actions to execute now, in order; after them the policy is asked again."""
        if self._ensemble is not None:
            return self._ensemble.add(chunk)[None]
        return np.asarray(chunk)[: self.execute_steps]
