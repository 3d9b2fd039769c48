"""Pictures from a data worker arrive without a copy, in memory that is filled again when they are dropped."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from librobot.data import shared_memory
from librobot.data.sampler import whole_batch
from librobot.data.sources.synthetic import synthetic
from librobot.data.windows import WindowDataset, Windows
from librobot.errors import LibrobotError

BATCH = 4
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory without a name is Linux's")


class Unreadable(WindowDataset):
    """Fails, after its pictures were read, where the first sample is 8."""

    def _gather(self, samples: Any) -> Any:
        batch = super()._gather(samples)
        if samples[0] == 8 and self.on_error == "raise":
            raise LibrobotError("unreadable")
        return batch


def dataset(kind: type[WindowDataset] = WindowDataset, **options: Any) -> WindowDataset:
    source = synthetic(episodes=3, length=(40, 40), height=32, width=48)
    return kind(source, Windows(source.episode_lengths, [0, 1, 2], horizon=4, obs_steps=2), **options)


def loader(data: WindowDataset) -> tuple[Iterator[Any], Any]:
    options: dict[str, Any] = {"batch_size": BATCH, "collate_fn": whole_batch, "num_workers": 1}
    batches = iter(DataLoader(data, prefetch_factor=2, **options))
    return batches, batches._workers[0].pid  # type: ignore[attr-defined]


def segments(process: int) -> int:
    """How many pieces of memory the worker has ever made."""
    found = set()
    for link in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile: a copy on its way
            if "librobot-pictures" in str(link.readlink()):
                found.add(link.stat().st_ino)
    return len(found)


def test_batches_are_those_of_one_process_and_memory_is_filled_again() -> None:
    data = dataset(goal_seed=3)
    batches, process = loader(data)
    made = []
    for index, batch in enumerate(batches):
        expected = data.__getitems__(list(range(BATCH * index, BATCH * (index + 1)))).observation
        for camera, pictures in batch.observation.images.items():
            assert type(pictures) is torch.Tensor
            assert torch.equal(pictures, expected.images[camera])
            assert torch.equal(batch.observation.goal_images[camera], expected.goal_images[camera])
        made.append(segments(process) if index < 25 else made[-1])
    assert len(made) == 30
    # Two cameras and goals for each of: two prepared, one being made, one here, one on its way back.
    assert made[0] > 0
    assert made[-1] <= 4 * 5


def test_batches_come_where_no_other_process_may_look_into_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "others_may_open", lambda path: False)  # workers are forked
    data = dataset()
    batches, _ = loader(data)
    for index, batch in zip(range(3), batches, strict=False):
        expected = data.__getitems__(list(range(BATCH * index, BATCH * (index + 1)))).observation
        assert torch.equal(batch.observation.images["front"], expected.images["front"])


def test_what_is_kept_is_not_filled_again() -> None:
    data = dataset()
    batches, _ = loader(data)
    kept = [(batch.observation.images["front"][:, 1], index) for index, batch in enumerate(batches)]
    gc.collect()
    for pictures, index in kept:  # views alone: their batches are gone
        rows = np.arange(BATCH * index, BATCH * (index + 1))
        expected = torch.from_numpy(data.source.images(data.windows.observation_rows(rows)[:, 1])["front"])
        assert torch.equal(pictures, expected)


def test_the_memory_of_a_batch_that_failed_is_filled_again() -> None:
    batches, process = loader(dataset(Unreadable))
    counts = []
    for _ in range(20):
        try:
            next(batches)
        except LibrobotError:
            continue
        counts.append(segments(process))
    assert len(counts) == 19
    assert counts[-1] <= 2 * 5


def test_without_a_worker_pictures_are_plain_arrays() -> None:
    batch = whole_batch(dataset()[3])
    assert type(batch.observation.images["front"]) is torch.Tensor
