"""Memory of data workers, and RLDS beside TFDS, at sizes that take seconds."""

import argparse
import mmap

import numpy as np
import pytest

from librobot.bench._data_memory import Series
from librobot.bench._process_memory import own_mebibytes
from librobot.bench._rlds import measure_rlds, write_rlds


def grown(per_thousand):
    samples = np.arange(1, 201) * 32
    wobble = 0.3 * np.sin(np.arange(200))
    return Series(
        samples.tolist(),
        (300 + per_thousand * samples / 1000 + wobble).tolist(),
        rate=100.0,
        milliseconds=1.0,
    )


def test_flat_memory_is_within_the_goal_and_a_leak_is_not():
    flat, leaking = (grown(slope).row("a worker's memory") for slope in (0.0, 0.2))
    assert flat.ratio < flat.goal
    assert leaking.ratio > leaking.goal
    assert leaking.ours - leaking.peer == pytest.approx(0.2 * 360, rel=0.1)  # an hour has 360,000 samples


def test_what_a_process_fills_is_its_own():
    size, before = 32 * 2**20, own_mebibytes()
    private = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    np.frombuffer(private, np.uint8)[:] = 1
    shared = mmap.mmap(-1, size)  # as batches are
    np.frombuffer(shared, np.uint8)[:] = 1
    assert own_mebibytes() - before == pytest.approx(32, abs=4)


@pytest.mark.slow
def test_rlds_is_read_by_both_sides(tmp_path, monkeypatch):
    monkeypatch.setenv("LIBROBOT_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("tensorflow_datasets")
    write_rlds(tmp_path / "rlds", episodes=2)
    output = tmp_path / "data.json"
    sizes = {"batch_size": 8, "num_workers": 1, "rounds": 1, "rlds_seconds": 4.0}
    arguments = argparse.Namespace(rlds_root=tmp_path / "rlds", clock="cpu", output=output, **sizes)
    speed, memory, *flat, first, later = measure_rlds(arguments)
    print(speed, memory, *flat, first, later, sep="\n")
    assert speed.ours > 0
    assert speed.peer > 0
    assert memory.ours > 20
    assert memory.peer > 20
    assert len(flat) == 2
    assert later.ours > 0
    assert first.peer == later.peer > 0
    assert output.with_name("data_rlds_memory.png").exists()
