"""A dataset with other episodes: some of them, or cut where the instruction changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from librobot.data.sources.base import Source
from librobot.data.statistics import vector_statistics
from librobot.types import RobotSpec


class SelectedSource:
    """`source` with the episodes whose rows are `rows[i]`, in that order: a `Source` of its own."""

    def __init__(self, source: Source, rows: Sequence[Int[np.ndarray, " n"]]) -> None:
        self.source = source
        self.spec: RobotSpec = source.spec
        self.episode_lengths = np.array([len(each) for each in rows], np.int64)
        self.rows = np.concatenate([np.zeros(0, np.int64), *rows])
        self.provenance: dict[str, Any] = dict(source.provenance)

    def states(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n s"]:
        return self.source.states(self.rows[rows])

    def actions(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n a"]:
        return self.source.actions(self.rows[rows])

    def images(self, rows: Int[np.ndarray, " n"]) -> dict[str, UInt8[np.ndarray, "n c h w"]]:
        return self.source.images(self.rows[rows])

    def prompts(self, rows: Int[np.ndarray, " n"]) -> list[str]:
        return self.source.prompts(self.rows[rows])

    def statistics(self) -> dict[str, dict[str, Float[np.ndarray, " dim"]]]:
        rows = np.arange(len(self.rows))
        return {
            "state": vector_statistics(self.states(rows)),
            "action": vector_statistics(self.actions(rows)),
        }


def rows_of(source: Source) -> list[Int[np.ndarray, " n"]]:
    """The rows of each episode."""
    lengths = source.episode_lengths
    return np.split(np.arange(int(lengths.sum())), np.cumsum(lengths)[:-1])


def cut_by_instruction(source: Source) -> SelectedSource:
    """Every stretch of one instruction as an episode."""
    stretches = []
    for rows in rows_of(source):
        prompts = np.array(source.prompts(rows), object)
        stretches += np.split(rows, np.flatnonzero(prompts[1:] != prompts[:-1]) + 1)
    return SelectedSource(source, stretches)
