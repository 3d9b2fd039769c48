"""RLDS written by TFDS and read without tensorflow, against what TFDS's own reader gives."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from librobot.data.images import decode_image
from librobot.data.sources.rlds import RldsSource
from librobot.data.sources.rlds_features import described
from librobot.data.sources.rlds_shards import scan_shard
from librobot.errors import LibrobotError

needs_tfds = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None, reason="needs the extra rlds"
)

ACTION = [
    {
        "field": "action/world_vector",
        "names": ["x", "y", "z"],
        "kind": "ee_position",
        "mode": "delta",
        "unit": "m",
    },
    {"field": "action/rotation_delta", "names": ["rx", "ry", "rz"], "kind": "ee_rotation", "mode": "delta"},
    {"field": "action/gripper", "then": "absolute_gripper", "names": ["gripper"], "kind": "gripper"},
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rlds")
    subprocess.run([sys.executable, Path(__file__).with_name("write_rlds.py"), root], check=True)
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def in_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBROBOT_CACHE", str(cache))


@pytest.mark.slow
@needs_tfds
def test_every_value_is_what_tfds_reads(written: Path) -> None:
    read = np.load(written / "read.npz")
    source = RldsSource(written / "robot/1.0.0", action=ACTION, control_hz=3)
    source = pickle.loads(pickle.dumps(source))
    rows = np.arange(20)
    assert source.episode_lengths.tolist() == read["lengths"].tolist()
    np.testing.assert_array_equal(source.states(rows), read["state"].astype(np.float32))
    found = source.actions(rows)
    np.testing.assert_array_equal(found[:, :3], read["world_vector"])
    np.testing.assert_array_equal(found[:, 3:6], read["rotation_delta"])
    assert source.prompts(rows) == read["prompt"].tolist()
    images = source.images(rows[::-1])
    np.testing.assert_array_equal(images["image"].transpose(0, 2, 3, 1), read["image"][::-1])
    difference = images["wrist"].transpose(0, 2, 3, 1).astype(int) - read["wrist"][::-1]
    assert np.abs(difference).max() <= 2  # JPEG: two decoders
    assert source.spec.camera_names == ("image", "wrist")
    assert [dim.name for dim in source.spec.action] == ["x", "y", "z", "rx", "ry", "rz", "gripper"]
    assert (source.spec.name, source.spec.control_hz) == ("robot", 3)


@pytest.mark.slow
@needs_tfds
def test_tensorflow_stays_out_and_shards_are_read_through_once(written: Path, cache: Path) -> None:
    RldsSource(written / "robot/1.0.0", action=["action/gripper"])
    made = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    code = (
        "import sys; from librobot.data.sources.rlds import RldsSource; "
        f"RldsSource({str(written / 'robot/1.0.0')!r}, action=['action/gripper']); "
        "sys.exit('tensorflow' in sys.modules or 'tensorflow_datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert made == {path: path.stat().st_mtime_ns for path in cache.rglob("*")}


@pytest.mark.slow
@needs_tfds
def test_any_features_bit_for_bit(tmp_path: Path) -> None:
    """Trees of features drawn by chance: numbers of every type and encoding, texts, labels, pictures; JPEGs
    as tensorflow's accurate transform decodes them. Also as TFDS described features before version 4.5."""
    seeds = range(12)
    program = Path(__file__).with_name("write_drawn_rlds.py")
    subprocess.run([sys.executable, program, tmp_path, *map(str, seeds)], check=True)
    kinds, left_out = set(), set()
    for seed in seeds:
        root = tmp_path / f"drawn{seed}/1.0.0"
        read, dataset = np.load(root / "read.npz"), described(root, "train")
        (root / "features.json").write_text((root / "legacy.json").read_text())
        assert described(root, "train") == dataset
        scans = [scan_shard(path, dataset.fields, count) for path, count in dataset.shards]
        assert set(read.files) == set(dataset.fields)
        left_out |= set(dataset.left_out.values())
        assert [scan["lengths"].tolist() for scan in scans] == [[3, 1], [40]]
        for name, field in dataset.fields.items():
            kinds.add((field.kind, field.dtype))
            if field.kind == "text":
                found = [
                    text for scan in scans for text in scan[f"texts/{name}"][scan[f"text_of_row/{name}"]]
                ]
                assert found == read[name].tolist()
            elif field.kind == "picture":
                places = [
                    (path.read_bytes(), place)
                    for (path, _), scan in zip(dataset.shards, scans, strict=True)
                    for place in scan[f"places/{name}"]
                ]
                frames = [decode_image(data[begin : begin + size]) for data, (begin, size) in places]
                np.testing.assert_array_equal(np.stack(frames), read[name])
            else:
                values = np.concatenate([scan[f"numbers/{name}"] for scan in scans])
                assert (values.dtype, values.shape) == (read[name].dtype, read[name].shape), name
                assert values.tobytes() == read[name].tobytes(), name
    assert len(kinds) > 20
    assert left_out == {"a feature of type Sequence"}


@pytest.mark.slow
@needs_tfds
def test_fields_steps_and_texts_are_chosen(written: Path) -> None:
    read = np.load(written / "read.npz")
    source = RldsSource(
        written / "robot/1.0.0",
        pictures={"front": "observation/image"},
        state=["observation/packed", "action/open"],
        action=[{"field": "observation/state", "take": [-2, None], "then": "reached"}],
        prompt="observation/letters",
        drop_first=1,
        drop_last=1,
    )
    assert source.episode_lengths.tolist() == (read["lengths"] - 2).tolist()
    first = int(read["lengths"][0])
    rows = np.array([0, int(read["lengths"][0]) - 2])  # the first kept steps of episodes 0 and 1
    steps = np.array([1, first + 1])
    np.testing.assert_array_equal(source.states(rows)[:, :2], read["packed"][steps])
    np.testing.assert_array_equal(source.states(rows)[:, 2], read["open"][steps].astype(np.float32))
    state = read["state"].astype(np.float32)[:, -2:]
    np.testing.assert_array_equal(source.actions(rows), state[steps + 1] - state[steps])
    assert source.prompts(rows) == ["".join(map(chr, read["letters"][s])).strip("\0") for s in steps]
    np.testing.assert_array_equal(source.images(rows)["front"].transpose(0, 2, 3, 1), read["image"][steps])


@pytest.mark.slow
@needs_tfds
def test_what_is_wrong(written: Path) -> None:
    root = written / "robot/1.0.0"
    with pytest.raises(
        LibrobotError, match=r"source.action\[0\]: no field 'action/worldvector'.*did you mean 'action/wor"
    ):
        RldsSource(root, action=["action/worldvector"])
    with pytest.raises(
        LibrobotError, match=r"Left out of the dataset: observation/points \(a feature of type Seq"
    ):
        RldsSource(root, action=["observation/points"])
    with pytest.raises(
        LibrobotError, match=r"no pictures 'observation/img'; did you mean 'observation/image'"
    ):
        RldsSource(root, action=ACTION, pictures={"a": "observation/img"})
    with pytest.raises(
        LibrobotError, match=r"record \d: episode \d has 3 steps; drop_first=2 and drop_last=1 leave none"
    ):
        RldsSource(root, action=ACTION, drop_first=2, drop_last=1)
    with pytest.raises(LibrobotError, match=r"TFDS folder with dataset_info.json .*, found .*robot"):
        RldsSource(written)
    with pytest.raises(LibrobotError, match=r"source.split: no split 'test'; it has train"):
        RldsSource(root, split="test")
