"""Datasets with other episodes: some of them, of several datasets, or cut where the instruction changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from librobot.data.sources.base import Source
from librobot.data.statistics import vector_statistics
from librobot.types import RobotSpec

EpisodeRows = tuple[Source, Int[np.ndarray, " n"]]
"""An episode: rows of a dataset."""


class SelectedSource:
    """The given episodes, in that order, as a `Source` of its own. Their datasets must be of one robot, whose
    spec and provenance the first gives."""

    def __init__(self, episodes: Iterable[EpisodeRows]) -> None:
        chosen = list(episodes)
        self.sources = list({id(source): source for source, _ in chosen}.values())
        number = {id(source): i for i, source in enumerate(self.sources)}
        self.spec: RobotSpec = self.sources[0].spec
        self.provenance: dict[str, Any] = dict(self.sources[0].provenance)
        self.episode_lengths = np.array([len(rows) for _, rows in chosen], np.int64)
        self.rows = np.concatenate([rows for _, rows in chosen])
        self.source_of_row = np.repeat([number[id(source)] for source, _ in chosen], self.episode_lengths)

    def states(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n s"]:
        return self._gather(rows, lambda source, own: source.states(own))

    def actions(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n a"]:
        return self._gather(rows, lambda source, own: source.actions(own))

    def images(self, rows: Int[np.ndarray, " n"]) -> dict[str, UInt8[np.ndarray, "n c h w"]]:
        out: dict[str, UInt8[np.ndarray, "n c h w"]] = {}
        for places, source, own in self._by_source(rows):
            for name, frames in source.images(own).items():
                if name not in out:
                    out[name] = np.empty((len(rows), *frames.shape[1:]), np.uint8)
                out[name][places] = frames
        return {name: out[name] for name in self.spec.camera_names if name in out}

    def prompts(self, rows: Int[np.ndarray, " n"]) -> list[str]:
        def texts(source: Source, own: np.ndarray) -> np.ndarray:
            return np.array(source.prompts(own), object)

        return self._gather(rows, texts).tolist()

    def statistics(self) -> dict[str, dict[str, Float[np.ndarray, " dim"]]]:
        rows = np.arange(len(self.rows))
        return {
            "state": vector_statistics(self.states(rows)),
            "action": vector_statistics(self.actions(rows)),
        }

    def _gather(
        self, rows: Int[np.ndarray, " n"], read: Callable[[Source, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        out: np.ndarray | None = None
        for places, source, own in self._by_source(rows):
            values = read(source, own)
            if out is None:
                out = np.empty((len(rows), *values.shape[1:]), values.dtype)
            out[places] = values
        assert out is not None, "no rows"
        return out

    def _by_source(self, rows: Int[np.ndarray, " n"]) -> list[tuple[np.ndarray, Source, np.ndarray]]:
        """Which of `rows` are of each dataset, and what they are there."""
        of = self.source_of_row[rows]
        which = [np.flatnonzero(of == i) for i in np.unique(of)]
        return [(places, self.sources[of[places[0]]], self.rows[rows[places]]) for places in which]


def rows_of(source: Source) -> list[Int[np.ndarray, " n"]]:
    """The rows of each episode."""
    lengths = source.episode_lengths
    return np.split(np.arange(int(lengths.sum())), np.cumsum(lengths)[:-1])


def cut_by_instruction(source: Source) -> SelectedSource:
    """Every stretch of one instruction as an episode."""
    stretches: list[np.ndarray] = []
    for rows in rows_of(source):
        prompts = np.array(source.prompts(rows), object)
        stretches += np.split(rows, np.flatnonzero(prompts[1:] != prompts[:-1]) + 1)
    return SelectedSource((source, rows) for rows in stretches)
