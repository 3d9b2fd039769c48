"""How much of the training came from each dataset of a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer

from librobot.types import Batch


class DatasetShares(Callback):
    """Logs `data/share/NAME`: the share of the samples trained on so far, resumed runs included.

    Counts what this process saw; the values of all are averaged.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.seen: np.ndarray = np.zeros(len(self.names), np.int64)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.seen = self.seen + np.bincount(batch.extra["dataset"], minlength=len(self.names))
        shares = self.seen / self.seen.sum()
        several = trainer.world_size > 1
        for name, share in zip(self.names, shares.tolist(), strict=True):
            pl_module.log(f"data/share/{name}", share, sync_dist=several, batch_size=batch.batch_size)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": dict(zip(self.names, self.seen.tolist(), strict=True))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = np.array([state_dict["seen"].get(name, 0) for name in self.names], np.int64)
