"""TFRecord files without tensorflow: what they hold, and what is said of broken ones."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import tfrecords_written as made
from hypothesis import given
from hypothesis import strategies as st

from librobot.data.images import encode_png
from librobot.data.sources import tfrecords
from librobot.data.sources.rlds import RldsSource
from librobot.errors import LibrobotError

ACTIONS = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
FRAMES = np.random.default_rng(1).integers(0, 256, (9, 4, 6, 3), dtype=np.uint8)
EPISODES = [
    made.episode(ACTIONS[a:b], [encode_png(frame) for frame in FRAMES[a:b]], [text] * (b - a))
    for a, b, text in ((0, 3, "a"), (3, 7, "b"), (7, 9, "a"))
]
FIRST, SECOND = (f"robot-train.tfrecord-0000{i}-of-00002" for i in range(2))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBROBOT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return made.write_folder(tmp_path / "robot/1.0.0", made.STEPS, [EPISODES[:2], EPISODES[2:]])


def test_a_folder_is_read(root: Path) -> None:
    """From two shards; again from the index; in another process."""
    for _ in range(2):
        source = pickle.loads(pickle.dumps(RldsSource(root, state=["count"])))
        rows = np.array([8, 0, 3, 3])
        assert source.episode_lengths.tolist() == [3, 4, 2]
        assert source.spec.camera_names == ("image",)
        np.testing.assert_array_equal(source.actions(rows), ACTIONS[rows])
        np.testing.assert_array_equal(source.states(rows)[:, 0], [93, -7, -7, -7])
        np.testing.assert_array_equal(source.images(rows)["image"].transpose(0, 2, 3, 1), FRAMES[rows])
        assert source.prompts(rows) == ["a", "a", "b", "b"]


def test_from_an_address(root: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/rlds/1.0.0", recursive=True)
    source = RldsSource("memory://rlds/1.0.0")
    np.testing.assert_array_equal(source.actions(np.arange(9)), ACTIONS)
    assert str(source.images(np.array([8]))["image"].shape) == "(1, 3, 4, 6)"


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


SIZES = [len(made.record(made.example(episode))) for episode in EPISODES]


@pytest.mark.parametrize(
    ("breaks", "message", "left"),
    [
        (
            lambda root: _flip(root / FIRST, SIZES[0] + 200),
            rf"{FIRST}: record 1: its bytes do not agree with its checksum",
            [3, 2],
        ),
        (
            lambda root: _flip(root / FIRST, SIZES[0]),
            rf"{FIRST}: record 1: its length at byte {SIZES[0]} does not agree",
            [3, 2],
        ),
        (
            lambda root: _cut(root / FIRST, SIZES[0] + 300),
            rf"{FIRST}: record 1: expected \d+ bytes from byte {SIZES[0] + 12} on, the file ends after 288;",
            [3, 2],
        ),
        (lambda root: _cut(root / FIRST, SIZES[0] + 5), r"record 1: the file ends within its header", [3, 2]),
        (
            lambda root: _cut(root / FIRST, SIZES[0]),
            rf"{FIRST}: expected 2 records as dataset_info.json says, found 1",
            [3, 2],
        ),
        (lambda root: _cut(root / SECOND, 0), rf"{SECOND}: the file is empty; copy the file again", [3, 4]),
        (lambda root: (root / SECOND).unlink(), rf"{SECOND}: missing; copy the dataset again", [3, 4]),
    ],
)
def test_broken_shards(root: Path, breaks, message: str, left: list[int]) -> None:
    breaks(root)
    for _ in range(2):
        with pytest.raises(LibrobotError, match=message):
            RldsSource(root)
    with pytest.warns(UserWarning, match=message):
        source = RldsSource(root, on_error="skip")
    assert source.episode_lengths.tolist() == left
    kept = np.flatnonzero(np.repeat([n in left for n in (3, 4, 2)], (3, 4, 2)))
    rows = np.arange(len(kept))
    np.testing.assert_array_equal(source.actions(rows), ACTIONS[kept])
    np.testing.assert_array_equal(source.images(rows)["image"].transpose(0, 2, 3, 1), FRAMES[kept])
    assert source.prompts(rows) == [("a", "b", "a")[i] for i in np.digitize(kept, [3, 7])]


@pytest.mark.parametrize(
    ("feature", "values", "message"),
    [
        (
            "steps/action",
            ACTIONS[:2],
            r"record 0: language_instruction: expected 2 steps as of action, found 3",
        ),
        (
            "steps/action",
            ACTIONS[0, :2],
            r"record 0: action: expected arrays of shape \(3,\), found 2 numbers",
        ),
        ("steps/action", np.arange(9), r"record 0: action: expected a list of float32, found one of int64"),
    ],
)
def test_an_episode_that_features_json_does_not_fit(tmp_path: Path, feature, values, message) -> None:
    episodes = [[EPISODES[0] | {feature: values}, EPISODES[1]]]
    root = made.write_folder(tmp_path / "robot/1.0.0", made.STEPS, episodes)
    with pytest.raises(LibrobotError, match=message):
        RldsSource(root)
    with pytest.warns(UserWarning, match=r"1 of 2 episodes are left out"):
        assert RldsSource(root, on_error="skip").episode_lengths.tolist() == [4]


def test_an_index_is_of_the_file_as_it_is(root: Path) -> None:
    RldsSource(root)
    _cut(root / FIRST, SIZES[0])
    with pytest.raises(LibrobotError, match="found 1"):
        RldsSource(root)


def test_fields_that_cannot_be_read(root: Path) -> None:
    with pytest.raises(
        LibrobotError, match=r"Left out of the dataset: observation/points \(a feature of type"
    ):
        RldsSource(root, action=["observation/points"])
    with pytest.raises(
        LibrobotError, match=r"no pictures 'observation/images'; did you mean 'observation/im"
    ):
        RldsSource(root, pictures={"front": "observation/images"})
    with pytest.raises(LibrobotError, match=r"source.prompt: no text 'action'; valid names: language_ins"):
        RldsSource(root, prompt="action")
    depth = {
        "image": {"shape": {"dimensions": ["4", "6", "1"]}, "dtype": "uint16"},
        "pythonClassName": "x.Image",
    }
    content = json.loads((root / "features.json").read_text())
    steps = content["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    (root / "features.json").write_text(
        json.dumps(content).replace(json.dumps(steps), json.dumps(steps | {"d": depth}))
    )
    assert RldsSource(root).spec.camera_names == ("image",)
    with pytest.raises(
        LibrobotError, match=r"no pictures 'd'; it is a picture of uint16 \(4, 6, 1\), neither"
    ):
        RldsSource(root, pictures={"front": "d"})


def test_other_files(root: Path) -> None:
    path = root / "dataset_info.json"
    info = path.read_text()
    path.write_text(info.replace('"tfrecord"', '"array_record"'))
    with pytest.raises(
        LibrobotError,
        match=r"format tfrecord, found array_record; .*tfds convert_format --dataset_version_dir=",
    ):
        RldsSource(root)
    path.write_text(info[:-5])
    with pytest.raises(
        LibrobotError, match=r"dataset_info.json: expected TFDS's metadata as JSON: .*copy it"
    ):
        RldsSource(root)
    path.write_text(info)
    (root / "features.json").write_text('{"featuresDict": {"features": {"image": {}}}}')
    with pytest.raises(LibrobotError, match=r"not RLDS: no feature 'steps'; it has image"):
        RldsSource(root)


@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_integers(values: list[int]) -> None:
    packed = b"".join(made.varint(value) for value in values)
    assert tfrecords.varints(packed).tolist() == values
    lone = b"".join(made.varint(8) + made.varint(value) for value in values)  # not packed: a field for each
    assert tfrecords.int_values(lone, (0, len(lone))).tolist() == values


@given(st.lists(st.floats(width=32, allow_nan=False)), st.binary(max_size=9))
def test_floats_packed_or_not_and_fields_of_later_versions(values: list[float], later: bytes) -> None:
    numbers = np.array(values, "<f4")
    unknown = made.message(9, later) + made.varint(10 << 3) + made.varint(300)
    lone = unknown + b"".join(made.varint(8 | 5) + number.tobytes() for number in numbers)
    packed = made.message(1, numbers.tobytes()) + unknown
    for data in (lone, packed):
        assert tfrecords.float_values(data, (0, len(data))).tobytes() == numbers.tobytes()


@given(st.binary(max_size=60), st.integers(0, 10**6))
def test_bytes_that_are_no_example(noise: bytes, seed: int) -> None:
    """An error that says so, or an Example, whatever the bytes are."""
    whole = made.example({"a": ACTIONS[:2], "b": [b"1", b"22"], "c": np.arange(200)})
    random = np.random.default_rng(seed)
    broken = bytearray(whole)
    broken[random.integers(len(whole))] = random.integers(256)
    for data in (noise, bytes(broken), whole[: random.integers(len(whole))]):
        try:
            for kind, span in tfrecords.features(data, (0, len(data))).values():
                values = (tfrecords.byte_values, tfrecords.float_values, tfrecords.int_values)[kind - 1]
                values(data, span)
        except ValueError:
            pass


def test_nothing_is_warned_of_a_sound_folder(root: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RldsSource(root, on_error="skip")
