"""Bags that the mcap libraries wrote, as episodes: every topic at every step, and what is wrong, by name."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bags import JOINTS, raw_picture, recording, write_bag
from mcap.writer import CompressionType

from librobot.config.build import open_source
from librobot.data.convert import convert
from librobot.data.sources.lerobot import LeRobotSource
from librobot.data.sources.mcap import McapSource
from librobot.errors import LibrobotError

ACTION: list[dict[str, Any]] = [{"topic": "/command", "field": "data"}]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LIBROBOT_CACHE", str(folder))
    return folder


def before(times: np.ndarray, first: float, period: float) -> np.ndarray:
    """When the last message came of a topic whose first came at `first`."""
    return first + np.floor((times - first) / period + 1e-6) * period


@pytest.mark.parametrize("compression", [CompressionType.NONE, CompressionType.LZ4, CompressionType.ZSTD])
def test_every_topic_at_every_step(tmp_path: Path, cache: Path, compression: CompressionType) -> None:
    """From 1.15 s, when the last camera begins, to 2.95 s, when it has its last picture."""
    write_bag(tmp_path / "stack_cups.mcap", recording(2.0), compression=compression)
    source = pickle.loads(pickle.dumps(McapSource(tmp_path, action=ACTION, control_hz=10)))
    assert source.episode_lengths.tolist() == [19]
    times, rows = 1.15 + np.arange(19) / 10, np.arange(19)
    state = before(times, 1.0, 0.02)
    expected = np.stack([state, state + 0.1, -state], 1)
    np.testing.assert_allclose(source.states(rows), expected, atol=1e-6)
    command = before(times, 1.01, 0.05)
    np.testing.assert_allclose(source.actions(rows)[:, 0], 2 * command, atol=1e-6)
    images = source.images(rows)
    assert images["cameras_top"].shape == (19, 3, 4, 6)
    assert (
        images["cameras_top"][:, 0, 0, 0].tolist()
        == (np.round(100 * before(times, 1.03, 0.1)) % 256).tolist()
    )
    assert images["cameras_top"][3, :, 2, 1].tolist() == [5, 4, 3]
    assert images["wrist"][:, 0, 0, 0].tolist() == (np.round(100 * before(times, 1.15, 0.2)) % 256).tolist()
    np.testing.assert_array_equal(source.images(rows[[7, 0, 7]])["wrist"], images["wrist"][[7, 0, 7]])
    assert [dim.name for dim in source.spec.state] == JOINTS
    assert [dim.name for dim in source.spec.action] == ["command_0", "command_1"]
    assert source.prompts(rows[:1]) == ["stack cups"]
    assert len(list((cache / "mcap").glob("*.npz"))) == 1
    with pytest.MonkeyPatch.context() as patch:  # what was read once is not read through again
        patch.setattr("librobot.data.sources.mcap_bags.scan_file", lambda *_: pytest.fail("read"))
        assert len(McapSource(tmp_path, action=ACTION, control_hz=5).states(rows[:10])) == 10


def test_what_counts_is_chosen(tmp_path: Path) -> None:
    write_bag(tmp_path / "a.mcap", recording(1.0))
    source = McapSource(
        tmp_path,
        state=[{"topic": "/joint_states", "joints": ["wrist"], "unit": "rad", "kind": "joint"}],
        action=[{"topic": "/joint_states", "joints": ["lift", "wrist"], "next": True, "names": ["a", "b"]}],
        pictures={"front": "/cameras/top/image_raw"},
        prompt_topic="/task",
        stamps="header",
        control_hz=20,
    )
    rows = np.arange(source.episode_lengths[0])
    assert len(rows) == 19  # from 1.03 to 1.98 s, and one less for the action
    np.testing.assert_allclose(source.states(rows)[1:, 0], source.actions(rows)[:-1, 1])
    np.testing.assert_array_equal(source.actions(rows)[:, 0], -source.actions(rows)[:, 1])
    assert set(source.prompts(rows)) == {"stack the cups"}
    assert source.spec.camera_names == ("front",)
    assert source.spec.state[0].unit == "rad"


def test_bags_of_one_and_of_several_files(tmp_path: Path) -> None:
    """A rosbag2 folder is one episode, also where it was split; files side by side are one each."""
    messages = recording(2.0)
    half = len(messages) // 2
    for name, part in (("bag_0.mcap", messages[:half]), ("bag_1.mcap", messages[half:])):
        write_bag(tmp_path / "all/bag" / name, part)
    (tmp_path / "all/bag/metadata.yaml").write_text("rosbag2_bagfile_information: {version: 9}\n")
    write_bag(tmp_path / "all/one.mcap", messages)
    write_bag(tmp_path / "all/two.mcap", recording(1.0))
    options = ["action=[{topic: /command, field: data}]", "max_age=0.3"]
    source = open_source(str(tmp_path / "all"), None, options)
    assert source.episode_lengths.tolist() == [19, 9, 19]
    assert source.prompts(np.array([0, 19, 28])) == ["one", "two", "bag"]
    rows = np.arange(19)
    for read in (source.states, source.actions, lambda own: source.images(own)["cameras_top"]):
        np.testing.assert_array_equal(read(rows + 28), read(rows))
    assert McapSource(tmp_path / "all/bag", action=ACTION).prompts(rows[:1]) == ["bag"]
    written = LeRobotSource(convert(source, tmp_path / "d", "lerobot", show=False))
    np.testing.assert_array_equal(written.states(np.arange(47)), source.states(np.arange(47)))
    np.testing.assert_array_equal(
        written.images(np.arange(47))["wrist"], source.images(np.arange(47))["wrist"]
    )


def test_protobuf_pictures_of_foxglove(tmp_path: Path) -> None:
    """Their message is described in the file, so no generated code is needed."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2
    from mcap_protobuf.writer import Writer

    file = descriptor_pb2.FileDescriptorProto(
        name="CompressedImage.proto", package="foxglove", syntax="proto3"
    )
    file.dependency.append("google/protobuf/timestamp.proto")
    message = file.message_type.add(name="CompressedImage")
    kinds = descriptor_pb2.FieldDescriptorProto
    optional = kinds.LABEL_OPTIONAL
    message.field.add(
        name="timestamp",
        number=1,
        type=kinds.TYPE_MESSAGE,
        label=optional,
        type_name=".google.protobuf.Timestamp",
    )
    message.field.add(name="data", number=2, type=kinds.TYPE_BYTES, label=optional)
    message.field.add(name="format", number=3, type=kinds.TYPE_STRING, label=optional)
    message.field.add(name="level", number=4, type=kinds.TYPE_DOUBLE, label=kinds.LABEL_REPEATED)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    made = message_factory.GetMessageClass(pool.FindMessageTypeByName("foxglove.CompressedImage"))
    from bags import compressed_picture

    with (tmp_path / "f.mcap").open("wb") as out, Writer(out) as writer:
        for i in range(5):
            picture = made(data=compressed_picture(i / 10)["data"], format="png", level=[i, 2 * i])
            picture.timestamp.FromNanoseconds(i * 10**8)
            writer.write_message("/cam", picture, log_time=7, publish_time=7)
    source = McapSource(tmp_path, action=[{"topic": "/cam", "field": "level"}], stamps="header")
    rows = np.arange(5)
    np.testing.assert_array_equal(source.actions(rows), np.stack([rows, 2 * rows], 1))
    assert source.images(rows)["cam"][:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40]
    assert source.spec.state_dim == 0


def spoilt(name: str, tmp_path: Path) -> dict[str, Any]:
    """A good bag a.mcap and a bad one, b.mcap; options of the source."""
    messages = recording(1.0)
    options: dict[str, Any] = {"action": ACTION}
    write_bag(tmp_path / "a.mcap", messages)
    if name == "no topic":
        messages = [m for m in messages if m[0] != "/command"]
    elif name == "paused":
        messages = [m for m in messages if m[0] != "/command" or not 1.3 < m[2] < 1.7]
        options["max_age"] = 0.25
    elif name == "apart":
        messages = [m for m in messages if m[0] != "/command" or m[2] < 1.1]
    elif name == "ragged":
        messages[-40:] = [(*m[:3], {"data": [1.0]}) if m[0] == "/command" else m for m in messages[-40:]]
    elif name == "joint":
        messages = [
            (*m[:3], m[3] | {"name": ["x", "elbow", "wrist"]}) if m[0] == "/joint_states" else m
            for m in messages
        ]
    path = write_bag(tmp_path / "b.mcap", messages)
    if name == "cut":
        path.write_bytes(path.read_bytes()[:-300])
    elif name == "damaged":
        data = bytearray(path.read_bytes())
        data[1500:1600] = b"\x00" * 100
        path.write_bytes(bytes(data))
    elif name == "empty":
        path.write_bytes(b"")
    return options


BROKEN = {
    "no topic": r"b.mcap: no topic '/command'; ",
    "paused": r"b.mcap: /command: step 4: its last message is 0\..* s old, above max_age=0.25",
    "apart": r"b.mcap: its topics share no time: /wrist/image_raw/compressed begins 0.090 s after /comm",
    "ragged": r"b.mcap: /command: message \d+: expected 2 values as before, found 1",
    "joint": r"b.mcap: joints: expected .*lift.* as in .*a.mcap, found .*'x'",
    "cut": r"b.mcap: expected a whole MCAP file, found \d+ bytes .*mcap recover",
    "damaged": r"b.mcap: (chunk \d+: damaged|expected a whole)",
    "empty": r"b.mcap: expected a whole MCAP file, found 0 bytes",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_bag(tmp_path: Path, name: str) -> None:
    options = spoilt(name, tmp_path)
    with pytest.raises(LibrobotError, match=BROKEN[name]):
        McapSource(tmp_path, **options)
    with pytest.warns(UserWarning, match=r"1 of 2 episodes are left out .*on_error=skip"):
        source = McapSource(tmp_path, **options, on_error="skip")
    assert source.episode_lengths.tolist() == [9]


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(LibrobotError, match=r"expected .mcap files or rosbag2 folders, found nothing"):
        McapSource(tmp_path / "none", action=ACTION)
    pictures = [("/cam", "sensor_msgs/msg/Image", t / 10, raw_picture(t / 10, "16UC1")) for t in range(30)]
    write_bag(tmp_path / "a.mcap", [*recording(1.0), *pictures])
    for action, message in (
        ([{"topic": "/comand"}], r"no topic '/comand'; did you mean '/command'"),
        ([{"topic": "/command"}], r"/command: message 0: no field 'position'.*valid names: .*data"),
        ([{"topic": "/task", "field": "data"}], r"/task: message 0: data: expected a number or numbers"),
        ([{"topic": "/joint_states", "joints": ["lft"]}], r"no joint 'lft'; did you mean 'lift'"),
    ):
        with pytest.raises(LibrobotError, match=message):
            McapSource(tmp_path, action=action, pictures={})
    for action, message in (
        ([], "at least one term"),
        ([{"topik": "/command"}], r"action\[0\]: unknown 'topik'; did you mean 'topic'"),
        ([{"topic": "/command", "field": "data", "names": ["x"]}], "1 names for the 2 values of /command"),
    ):
        with pytest.raises(ValueError, match=message):
            McapSource(tmp_path, action=action, pictures={})
    with pytest.raises(LibrobotError, match=r"encoding '16UC1' are not read"):
        McapSource(tmp_path, action=ACTION, pictures={"depth": "/cam"}, max_age=None)


def test_raw_frames_of_one_choice_are_not_those_of_another(tmp_path: Path) -> None:
    """Both have as many pictures of one size, of the same file."""
    write_bag(tmp_path / "a.mcap", recording(1.0))
    common: dict[str, Any] = {"action": ACTION, "image_size": [8, 8]}
    for pictures in ({"c": "/cameras/top/image_raw"}, {"c": "/wrist/image_raw/compressed"}):
        kept = McapSource(tmp_path, **common, pictures=pictures, cache="memmap")
        read = McapSource(tmp_path, **common, pictures=pictures)
        rows = np.arange(int(kept.episode_lengths[0]))
        np.testing.assert_array_equal(kept.images(rows)["c"], read.images(rows)["c"])
