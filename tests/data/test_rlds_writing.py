"""RLDS that `convert` writes, read by TFDS and by data=rlds."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from librobot.config.build import open_source
from librobot.data import rlds_writer
from librobot.data.convert import convert
from librobot.data.images import encode_jpeg
from librobot.data.rlds_writer import RldsWriter
from librobot.data.sources.lerobot import LeRobotSource
from librobot.errors import LibrobotError
from librobot.types import Camera, Dim, RobotSpec

needs_tfds = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None, reason="needs the extra rlds"
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LIBROBOT_CACHE", str(folder))
    return folder


@pytest.mark.slow
@needs_tfds
def test_tfds_reads_what_is_written_and_so_does_data_rlds(
    tmp_path: Path, image_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two shards; killed before the second, and again before they get their names."""
    source, target = LeRobotSource(image_dataset), tmp_path / "robot/1.0.0"
    run = RldsWriter._run
    for stop_at in ("shard", "finish"):

        def breaks(self: Any, what: str, stop_at: str = stop_at) -> None:
            if what == stop_at and self.described["shards"]:
                raise KeyboardInterrupt
            run(self, what)

        with monkeypatch.context() as patch:
            patch.setattr(RldsWriter, "_run", breaks)
            patch.setattr(RldsWriter.__init__, "__kwdefaults__", {"shard_bytes": 10_000})
            with pytest.raises(KeyboardInterrupt):
                convert(source, target, "rlds", show=False)
    convert(source, target, "rlds", show=False)
    assert len(list(target.glob("arm-train.tfrecord-*-of-00002"))) == 2
    assert sorted(path.name for path in target.parent.iterdir()) == ["1.0.0"]
    subprocess.run(
        [sys.executable, Path(__file__).with_name("read_rlds.py"), target, tmp_path / "read.npz"], check=True
    )
    read, rows = np.load(tmp_path / "read.npz"), np.arange(20)
    assert read["lengths"].tolist() == source.episode_lengths.tolist() == [5, 1, 8, 6]
    np.testing.assert_array_equal(read["action"], source.actions(rows))
    np.testing.assert_array_equal(read["state"], source.states(rows))
    assert read["prompt"].tolist() == source.prompts(rows)
    assert np.flatnonzero(read["is_first"]).tolist() == [0, 5, 6, 14]
    assert np.flatnonzero(read["is_last"]).tolist() == [4, 5, 13, 19]
    for name, frames in source.images(rows).items():
        np.testing.assert_array_equal(read[name].transpose(0, 3, 1, 2), frames)
    ours = open_source(str(target), None, [])
    assert ours.spec == source.spec
    np.testing.assert_array_equal(ours.states(rows), source.states(rows))
    np.testing.assert_array_equal(ours.images(rows)["wrist"], source.images(rows)["wrist"])
    assert ours.prompts(rows) == source.prompts(rows)


@pytest.mark.slow
@needs_tfds
def test_pictures_as_jpeg(tmp_path: Path, image_dataset: Path) -> None:
    """`convert --jpeg`: TFDS and data=rlds see what JPEG makes of the pictures at that quality; numbers are
    untouched."""
    source, rows = LeRobotSource(image_dataset), np.arange(20)
    target = convert(source, tmp_path / "robot/1.0.0", "rlds", jpeg=90, show=False)
    features = json.loads((target / "features.json").read_text())
    command = [sys.executable, Path(__file__).with_name("read_rlds.py"), target, tmp_path / "read.npz"]
    subprocess.run(command, check=True)
    ours = open_source(str(target), None, [])
    images, states = ours.images(rows), ours.states(rows)
    assert json.dumps(features).count('"jpeg"') == len(source.spec.cameras)
    read = np.load(tmp_path / "read.npz")
    np.testing.assert_array_equal(read["action"], source.actions(rows))
    np.testing.assert_array_equal(states, source.states(rows))
    for name, frames in source.images(rows).items():
        expected = [np.asarray(Image.open(io.BytesIO(encode_jpeg(f.transpose(1, 2, 0), 90)))) for f in frames]
        for decoded in (read[name], images[name].transpose(0, 2, 3, 1)):
            apart = np.abs(decoded.astype(int) - np.stack(expected))
            assert apart.max() <= 3, "decoders of JPEG round differently, and no more"
        assert np.abs(frames.transpose(0, 2, 3, 1).astype(int) - np.stack(expected)).max() > 3


def test_what_rlds_cannot_hold(tmp_path: Path) -> None:
    for name in ("state", "a/b"):
        spec = RobotSpec("arm", (Camera(name, 4, 4),), (), (Dim("x"),), 10.0)
        with pytest.raises(ValueError, match=r"only letters, digits.*the name state is taken"):
            RldsWriter(tmp_path / "d", spec)
    assert not (tmp_path / "d").exists()


def test_a_program_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = RobotSpec("arm", (), (), (Dim("x"),), 10.0)
    writer = RldsWriter(tmp_path / "d", spec)
    writer.add_episode(images={}, state=np.zeros((2, 0)), action=np.zeros((2, 1)), task="go")

    def fails(module: str, arguments: list[str], log: Path) -> None:
        assert (module, arguments[1]) == ("librobot.data.rlds_build", "shard")
        raise RuntimeError("OSError: disk full")

    monkeypatch.setattr(rlds_writer, "run_with_tensorflow", fails)
    with pytest.raises(LibrobotError, match=r"d: TFDS cannot write it: OSError: disk full"):
        writer.finalize()
    assert RldsWriter(tmp_path / "d", spec).num_episodes == 1
