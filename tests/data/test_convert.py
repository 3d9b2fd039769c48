"""Any format to any other keeps every state, action, instruction, episode and pixel."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from synthetic import ArraySource

from librobot.data import format as v3
from librobot.data import hdf5_writer, webdataset_writer, zarr_writer
from librobot.data.convert import convert
from librobot.data.detect import detect
from librobot.data.sources.base import Source
from librobot.data.sources.hdf5 import Hdf5Source
from librobot.data.sources.lerobot import LeRobotSource
from librobot.data.sources.rlds import RldsSource
from librobot.data.sources.webdataset import WebDatasetSource
from librobot.data.sources.zarr import ZarrSource
from librobot.errors import LibrobotError
from librobot.types import Camera, Dim, RobotSpec

OPEN: dict[str, Callable[[Path], Source]] = {
    "lerobot": LeRobotSource,
    "hdf5": lambda path: Hdf5Source(path, layout="aloha"),
    "zarr": ZarrSource,
    "webdataset": WebDatasetSource,
}
WRITERS = {"zarr": zarr_writer, "hdf5": hdf5_writer, "webdataset": webdataset_writer}


class Random(ArraySource):
    """Random values, an instruction for each episode."""

    def __init__(self, lengths: list[int], spec: RobotSpec, prompts: list[str], seed: int) -> None:
        super().__init__(lengths, spec)
        generator, total = np.random.default_rng(seed), sum(lengths)
        self._state = generator.normal(size=(total, spec.state_dim)).astype(np.float32)
        self._action = generator.normal(size=(total, spec.action_dim)).astype(np.float32)
        self._images = {
            c.name: generator.integers(0, 256, (total, 3, c.height, c.width), dtype=np.uint8)
            for c in spec.cameras
        }
        self._prompts = np.repeat(np.array(prompts, object), lengths)

    def states(self, rows: np.ndarray) -> np.ndarray:
        return self._state[rows]

    def actions(self, rows: np.ndarray) -> np.ndarray:
        return self._action[rows]

    def images(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {name: frames[rows] for name, frames in self._images.items()}

    def prompts(self, rows: np.ndarray) -> list[str]:
        return self._prompts[rows].tolist()


def assert_same(found: Source, expected: Source) -> None:
    assert found.episode_lengths.tolist() == expected.episode_lengths.tolist()
    rows = np.arange(int(expected.episode_lengths.sum()))
    np.testing.assert_array_equal(found.states(rows), expected.states(rows))
    np.testing.assert_array_equal(found.actions(rows), expected.actions(rows))
    assert found.prompts(rows) == expected.prompts(rows)
    ours, theirs = found.images(rows), expected.images(rows)
    assert set(ours) == set(theirs)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert found.spec.state == expected.spec.state
    assert found.spec.action == expected.spec.action
    assert found.spec.control_hz == expected.spec.control_hz


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBROBOT_CACHE", str(tmp_path_factory.mktemp("cache")))


texts = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=20
)


PER_FRAME = {"lerobot", "webdataset", "rlds"}
"""The formats that hold an instruction for each frame, not one for each episode."""


def draw_source(data: st.DataObject, *, per_frame: bool) -> Random:
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    prompts = data.draw(st.lists(texts, min_size=len(lengths), max_size=len(lengths)))
    state_dim, action_dim = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    cameras = tuple(Camera(name, 4, 6) for name in data.draw(st.sampled_from(["", "a", "ba"])))
    state = tuple(Dim(f"s{i}", "rad", "joint", low=-3.0) for i in range(state_dim))
    spec = RobotSpec("arm", cameras, state, tuple(Dim(f"a{i}") for i in range(action_dim)), 10.0)
    source = Random(lengths, spec, prompts, data.draw(st.integers(0, 99)))
    if per_frame:
        frames = st.lists(st.sampled_from(["x", "y", *prompts]), min_size=sum(lengths), max_size=sum(lengths))
        source._prompts = np.array(data.draw(frames), object)
    return source


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(OPEN, 2)))
@settings(
    max_examples=3,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_every_pair_of_formats_keeps_everything(
    tmp_path_factory: pytest.TempPathFactory, first: Any, second: Any, data: st.DataObject
) -> None:
    tmp_path = tmp_path_factory.mktemp("round")
    source = draw_source(data, per_frame={first, second} <= PER_FRAME)
    once = OPEN[first](convert(source, tmp_path / "one", first, show=False))
    assert_same(once, source)
    assert detect(tmp_path / "one") == {"hdf5": "aloha"}.get(first, first)
    assert_same(OPEN[second](convert(once, tmp_path / "two", second, show=False)), source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorflow_datasets") is None, reason="needs the extra rlds")
@pytest.mark.parametrize("other", list(OPEN))
@settings(max_examples=1, deadline=None, phases=[Phase.generate])
@given(data=st.data())
def test_every_pair_with_rlds_keeps_everything(
    tmp_path_factory: pytest.TempPathFactory, other: Any, data: st.DataObject
) -> None:
    tmp_path = tmp_path_factory.mktemp("round")
    source = draw_source(data, per_frame=other in PER_FRAME)
    once = OPEN[other](convert(source, tmp_path / "one", other, show=False))
    rlds = RldsSource(convert(once, tmp_path / "two", "rlds", show=False))
    assert_same(rlds, source)
    assert rlds.spec == once.spec
    assert_same(OPEN[other](convert(rlds, tmp_path / "three", other, show=False)), source)


@pytest.mark.parametrize("to", sorted(set(OPEN) - PER_FRAME))
def test_instructions_that_change_within_an_episode(tmp_path: Path, source: Any, to: Any) -> None:
    """One of a format that holds one for each episode is refused, or cut."""
    source._prompts[4:6] = "another"
    with pytest.raises(LibrobotError, match=r"episode 1 has 2 instructions .*give --cut.* or --prompt"):
        convert(source, tmp_path / "x", to, show=False)
    assert not list(tmp_path.iterdir())
    found = OPEN[to](convert(source, tmp_path / "x", to, cut=True, show=False))
    assert found.episode_lengths.tolist() == [3, 1, 2, 2, 2, 4]
    rows = np.arange(14)
    assert found.prompts(rows) == source.prompts(rows)
    np.testing.assert_array_equal(found.actions(rows), source.actions(rows))
    np.testing.assert_array_equal(found.images(rows)["front"], source.images(rows)["front"])


def test_lerobot_reads_instructions_that_change(tmp_path: Path, source: Any) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    source._prompts[4:6] = "another"
    folder = convert(source, tmp_path / "d", "lerobot", show=False)
    theirs = LeRobotDataset("somebody/something", root=folder)
    assert [theirs[i]["task"] for i in range(14)] == source.prompts(np.arange(14))
    assert theirs.meta.episodes[1]["tasks"] == ["b", "another"]
    table = pq.read_table(folder / v3.EPISODES_PATH.format(chunk_index=0, file_index=0))
    assert table["stats/task_index/max"].to_pylist()[:2] == [[0.0], [2.0]]


@pytest.fixture
def source(spec: RobotSpec) -> Source:
    return Random([3, 5, 2, 4], spec, ["a", "b", "a", "c"], 1)


@pytest.mark.parametrize("to", list(OPEN))
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_conversion_goes_on(
    tmp_path: Path, source: Any, monkeypatch: pytest.MonkeyPatch, to: Any, after: int
) -> None:
    """It breaks off while the pictures of an episode are read, and again while one is written."""
    whole, images, read = tmp_path / "whole", source.images, []

    def breaks(rows: np.ndarray) -> dict[str, np.ndarray]:
        if len(read) == after:
            raise KeyboardInterrupt
        read.append(rows)
        return images(rows)

    with monkeypatch.context() as patch:
        patch.setattr(source, "images", breaks)
        with pytest.raises(KeyboardInterrupt):
            convert(source, whole, to, show=False)
    assert not whole.exists()
    with monkeypatch.context() as patch:
        module = WRITERS.get(to)
        if module is not None:  # dies within the next episode
            patch.setattr(module, "finite_spec", lambda spec: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                convert(source, whole, to, show=False)
    other = Random([2], source.spec, ["x"], 0)
    with pytest.raises(LibrobotError, match=r"whole.partial: parts of another conversion"):
        convert(other, whole, to, show=False)
    read.clear()
    monkeypatch.setattr(source, "images", lambda rows: read.append(rows) or images(rows))
    convert(source, whole, to, show=False)
    assert len(read) == 4 - after
    assert_same(OPEN[to](whole), source)


@pytest.mark.parametrize("to", ["hdf5", "webdataset"])
def test_pictures_as_jpeg(tmp_path: Path, image_dataset: Path, to: Any) -> None:
    """Everything else stays bit for bit."""
    source, rows = LeRobotSource(image_dataset), np.arange(20)
    folder = convert(source, tmp_path / "d", to, jpeg=95, show=False)
    found = OPEN[to](folder)
    np.testing.assert_array_equal(found.states(rows), source.states(rows))
    for name, frames in source.images(rows).items():
        difference = np.abs(found.images(rows)[name].astype(int) - frames)
        assert 0 < difference.mean() < 6
    if to == "hdf5":
        with h5py.File(folder / "episode_0.hdf5") as file:
            assert file.attrs["compress"]
            assert bytes(file["observations/images/front"][0, :2]) == b"\xff\xd8"


def test_raw_frames_of_one_choice_are_not_those_of_another(tmp_path: Path, source: Source) -> None:
    zarr_folder = convert(source, tmp_path / "z", "zarr", show=False)
    shards = convert(source, tmp_path / "w", "webdataset", show=False)
    for kind, folder in ((ZarrSource, zarr_folder), (WebDatasetSource, shards)):
        for camera in ("front", "wrist"):
            kept = kind(folder, pictures={"c": camera}, image_size=(8, 8), cache="memmap")
            read = kind(folder, pictures={"c": camera}, image_size=(8, 8))
            np.testing.assert_array_equal(kept.images(np.arange(14))["c"], read.images(np.arange(14))["c"])


def test_other_tools_read_what_is_written(tmp_path: Path, source: Source) -> None:
    rows = np.arange(14)
    root = zarr.open_group(str(convert(source, tmp_path / "z.zarr", "zarr", show=False)), mode="r")
    assert root["meta/episode_ends"][:].tolist() == [3, 8, 10, 14]
    np.testing.assert_array_equal(root["data/action"][:], source.actions(rows))
    np.testing.assert_array_equal(root["data/front"][:], source.images(rows)["front"].transpose(0, 2, 3, 1))
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    folder = convert(source, tmp_path / "lerobot", "lerobot", show=False)
    theirs = LeRobotDataset("somebody/something", root=folder)
    np.testing.assert_array_equal(theirs[4]["action"].numpy(), source.actions(rows)[4])
    assert theirs[9]["task"] == "a"


def test_what_cannot_be_converted(tmp_path: Path, source: Any, spec: RobotSpec) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(LibrobotError, match="there: exists already"):
        convert(source, tmp_path / "there", "zarr")
    convert(source, tmp_path / "x", "zarr", prompt="do it", show=False)
    assert set(ZarrSource(tmp_path / "x").prompts(np.arange(14))) == {"do it"}
    for to, options, message in (
        ("zarr", {"jpeg": 90}, "holds pixels, no JPEG"),
        ("hdf5", {"jpeg": 0}, "a quality from 1 to 100, found 0"),
        ("lerobot", {"jpeg": 90}, "--to lerobot: takes --video"),
        ("rlds", {"video": True}, "--to rlds: takes --jpeg QUALITY"),
    ):
        with pytest.raises(LibrobotError, match=message):
            convert(source, tmp_path / "y", to, **options, show=False)  # type: ignore[arg-type]
    slow = RobotSpec(spec.name, spec.cameras, spec.state, spec.action, 12.5)
    with pytest.raises(LibrobotError, match=r"found 12.5; give --fps"):
        convert(Random([2], slow, ["x"], 0), tmp_path / "y", "lerobot", show=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there", "x"]
