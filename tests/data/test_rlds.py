"""RLDS written by TFDS and read without tensorflow, against what TFDS's own reader gives."""

from __future__ import annotations

import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from librobot.data.images import encode_png
from librobot.data.rlds_export import Field
from librobot.data.sources import rlds
from librobot.data.sources.rlds import RldsSource
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
def export_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.mark.slow
@needs_tfds
def test_every_value_is_what_tfds_reads(written: Path, export_dir: Path) -> None:
    read = np.load(written / "read.npz")
    source = RldsSource(written / "robot/1.0.0", action=ACTION, export_dir=export_dir, control_hz=3)
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
def test_tensorflow_stays_out_and_the_export_is_made_once(written: Path, export_dir: Path) -> None:
    RldsSource(written / "robot/1.0.0", action=ACTION, export_dir=export_dir)
    made = {path: path.stat().st_mtime_ns for path in export_dir.rglob("*")}
    code = (
        "import sys; from librobot.data.sources.rlds import RldsSource; "
        f"RldsSource({str(written / 'robot/1.0.0')!r}, action=['action/gripper'], "
        f"export_dir={str(export_dir)!r}); sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert made == {path: path.stat().st_mtime_ns for path in export_dir.rglob("*")}


@pytest.mark.slow
@needs_tfds
def test_fields_steps_and_texts_are_chosen(written: Path, export_dir: Path) -> None:
    read = np.load(written / "read.npz")
    source = RldsSource(
        written / "robot/1.0.0",
        pictures={"front": "observation/image"},
        state=["observation/packed", "action/open"],
        action=[{"field": "observation/state", "take": [-2, None], "then": "reached"}],
        prompt="observation/letters",
        drop_first=1,
        drop_last=1,
        export_dir=export_dir,
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
def test_what_is_wrong(written: Path, export_dir: Path, tmp_path: Path) -> None:
    root = written / "robot/1.0.0"
    with pytest.raises(
        LibrobotError, match=r"source.action\[0\]: no field 'action/worldvector'.*did you mean 'action/wor"
    ):
        RldsSource(root, action=["action/worldvector"], export_dir=export_dir)
    with pytest.raises(
        LibrobotError, match=r"Left out of the dataset: observation/points \(a feature of type Seq"
    ):
        RldsSource(root, action=["observation/points"], export_dir=export_dir)
    with pytest.raises(
        LibrobotError, match=r"no pictures 'observation/img'; did you mean 'observation/image'"
    ):
        RldsSource(root, action=ACTION, pictures={"a": "observation/img"}, export_dir=export_dir)
    with pytest.raises(
        LibrobotError, match=r"episode \d has 3 steps; drop_first=2 and drop_last=1 leave none"
    ):
        RldsSource(root, action=ACTION, drop_first=2, drop_last=1, export_dir=export_dir)
    with pytest.raises(LibrobotError, match=r"TFDS folder with dataset_info.json .*, found .*robot"):
        RldsSource(written, export_dir=export_dir)
    with pytest.raises(LibrobotError, match=r"TFDS cannot read it: .*no split 'test'; it has train"):
        RldsSource(root, split="test", export_dir=tmp_path)
    assert not list(tmp_path.glob("*.partial"))


def test_an_export_is_read_without_tfds(tmp_path: Path) -> None:
    """What the exporting program writes, written by its own parts."""
    root = tmp_path / "robot/1.0.0"
    root.mkdir(parents=True)
    (root / "dataset_info.json").write_text("{}")
    generator = np.random.default_rng(0)
    actions = generator.normal(size=(7, 3)).astype(np.float32)
    frames = generator.integers(0, 256, (7, 4, 6, 3), dtype=np.uint8)
    texts = [b"a", b"a", b"a", b"b", b"b", b"b", b"b"]

    def export(root: Path, split: str, target: Path) -> None:
        target.mkdir(parents=True)
        kinds = ("numbers", "text", "picture")
        fields = [Field(target, number, kind) for number, kind in enumerate(kinds)]
        pictures = np.array([encode_png(frame) for frame in frames], object)
        for episode in (slice(0, 3), slice(3, 7)):
            fields[0].add(actions[episode])
            fields[1].add(np.array(texts, object)[episode])
            fields[2].add(pictures[episode])
        names = ("action", "language_instruction", "observation/image")
        described = {name: field.close() for name, field in zip(names, fields, strict=True)}
        content = {"lengths": [3, 4], "fields": described, "left_out": {}, "name": "robot"}
        (target / "content.json").write_text(json.dumps(content))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlds, "_export", export)
        source = pickle.loads(pickle.dumps(RldsSource(root, export_dir=tmp_path / "cache")))
    rows = np.array([6, 0, 2, 2])
    assert source.spec.state_dim == 0
    np.testing.assert_array_equal(source.actions(rows), actions[rows])
    np.testing.assert_array_equal(source.images(rows)["image"].transpose(0, 2, 3, 1), frames[rows])
    assert source.prompts(rows) == ["b", "a", "a", "a"]
