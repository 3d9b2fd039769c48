"""What is wrong with a dataset is one LibrobotError: the file, the episode, what was expected and found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from librobot.config.build import build_spec
from librobot.data.sources.lerobot import LeRobotSource
from librobot.errors import LibrobotError
from librobot.types import RobotSpec

DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
VIDEO = "videos/observation.images.front/chunk-000/file-000.mp4"


@pytest.fixture
def damaged(image_dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(image_dataset, tmp_path / "damaged"))


@pytest.fixture
def damaged_video(video_dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(video_dataset, tmp_path / "damaged"))


def message(root: Path, **options: object) -> str:
    """Of the one error, whether it comes when the dataset is opened or when its last frames are read."""
    with pytest.raises(LibrobotError) as error:
        source = LeRobotSource(root, **options)  # type: ignore[arg-type]
        source.images(np.arange(source.episode_lengths.sum()))
    return str(error.value)


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def replace_column(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def test_no_action_feature(damaged: Path) -> None:
    path = damaged / "meta/info.json"
    info = json.loads(path.read_text())
    info["features"]["actions"] = info["features"].pop("action")
    path.write_text(json.dumps(info))
    text = message(damaged)
    assert str(path) in text
    assert "no action column 'action'; did you mean 'actions'?" in text
    assert "data.source.action_key" in text


def test_no_action_column_in_a_data_file(damaged: Path) -> None:
    rewrite(damaged / DATA, lambda table: table.drop_columns(["action"]))
    assert message(damaged).startswith(f"{damaged / DATA}: no column 'action'")


def test_a_camera_that_the_dataset_lacks(image_dataset: Path) -> None:
    text = message(image_dataset, cameras=["front", "wrists"])
    assert text.startswith(f"{image_dataset}: no camera 'wrists' in the dataset; did you mean 'wrist'?")
    assert "valid names: front, wrist" in text


def robot(spec: RobotSpec, cameras: list[str]) -> dict:
    plain = spec.to_dict() | {"name": "other"}
    plain["cameras"] = [{"name": name, "height": 480, "width": 640} for name in cameras]
    for key in ("state", "action"):
        plain[key] = [{"name": dim["name"]} for dim in plain[key]]
    return {"_target_": "librobot.types.RobotSpec", **plain}


@pytest.mark.parametrize("cameras", [["front", "top"], ["front"], ["front", "wrist", "top"]])
def test_a_robot_with_other_cameras(image_dataset: Path, spec: RobotSpec, cameras: list[str]) -> None:
    cfg = OmegaConf.create({"robot": robot(spec, cameras)})
    with pytest.raises(LibrobotError) as error:
        build_spec(cfg, LeRobotSource(image_dataset))
    text = str(error.value)
    assert f"{image_dataset} does not fit robot 'other'" in text
    assert f"cameras is [front, wrist] in the dataset, [{', '.join(sorted(cameras))}] in the robot" in text
    assert "data.cameras" in text


def test_a_robot_that_fits_takes_the_stored_sizes(image_dataset: Path, spec: RobotSpec) -> None:
    cfg = OmegaConf.create({"robot": robot(spec, ["wrist", "front"])})
    found = build_spec(cfg, LeRobotSource(image_dataset))
    assert found.name == "other"
    assert [(c.name, c.height, c.width) for c in found.cameras] == [("wrist", 24, 24), ("front", 32, 48)]


def test_a_robot_of_another_rate_warns(image_dataset: Path, spec: RobotSpec) -> None:
    node = robot(spec, ["wrist", "front"]) | {"control_hz": 2 * spec.control_hz}
    with pytest.warns(UserWarning, match="2 times as fast"):
        build_spec(OmegaConf.create({"robot": node}), LeRobotSource(image_dataset))


@pytest.mark.parametrize("change", [{"name": "arm", "arms": 2}, {"control_hz": 0}, {"action": [{"low": 1}]}])
def test_a_stored_robot_that_is_none(damaged: Path, change: dict) -> None:
    path = damaged / "meta/librobot.json"
    described = json.loads(path.read_text())
    described["spec"] |= change
    path.write_text(json.dumps(described))
    assert message(damaged).startswith(f"{path}: spec: expected what RobotSpec.to_dict gives")


@pytest.mark.parametrize(("key", "name"), [("action", "gripper"), ("observation.state", "joint_1")])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(damaged: Path, key: str, name: str, value: float) -> None:
    """Row 9 is frame 3 of episode 2 (of 5, 1, 8 and 6 frames)."""

    def change(table: pa.Table) -> pa.Table:
        values = np.array(table[key].to_pylist(), np.float32)
        values[9, 1] = value
        return replace_column(table, key, pa.array(values.tolist(), pa.list_(pa.float32(), values.shape[1])))

    rewrite(damaged / DATA, change)
    text = message(damaged)
    assert text.startswith(f"{damaged / DATA}: episode 2, frame 3: {key} dimension {name!r} is {value}")
    assert "(1 are not)" in text


def test_an_empty_value(damaged: Path) -> None:
    def change(table: pa.Table) -> pa.Table:
        values = table["action"].to_pylist()
        values[9] = None
        return replace_column(table, "action", pa.array(values, pa.list_(pa.float32(), 2)))

    rewrite(damaged / DATA, change)
    assert message(damaged).startswith(f"{damaged / DATA}: row 9: action is empty")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_video(damaged_video: Path, share: float) -> None:
    path = damaged_video / VIDEO
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    text = message(damaged_video)
    episode = 3 if share > 0.9 else 0
    assert text.startswith(
        f"{path}: the video is cut short or damaged from episode {episode} on: expected 20"
    )
    assert "frames, found" in text


def test_a_video_with_fewer_frames(damaged_video: Path, video_dataset: Path) -> None:
    """Whole as a file: another recording's, of 5 frames at 10 Hz."""
    from librobot.data.video import encode_video

    path = damaged_video / VIDEO
    path.unlink()
    encode_video(path, np.zeros((5, 32, 48, 3), np.uint8), 10)
    text = message(damaged_video)
    assert text.startswith(f"{path}: ")
    assert "from episode 1 on: expected 20 frames, found 5" in text


def test_a_missing_video(damaged_video: Path) -> None:
    (damaged_video / VIDEO).unlink()
    text = message(damaged_video)
    assert text.startswith(
        f"{damaged_video / VIDEO}: missing; expected the video of episodes 0 to 3 (20 frames)"
    )


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_parquet_file(damaged: Path, share: float) -> None:
    path = damaged / DATA
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    text = message(damaged)
    assert text.startswith(f"{path}: not a whole parquet file ({path.stat().st_size} bytes")
    assert "expected the frames of episodes 0 to 3" in text


def test_damaged_pixels(damaged: Path) -> None:
    """The file is whole and its numbers read, but the bytes of the front camera are another thing."""
    path = damaged / DATA
    file = pq.ParquetFile(path)
    column = file.schema_arrow.names.index("observation.images.front")
    chunk = file.metadata.row_group(2).column(2 * column)
    assert chunk.path_in_schema == "observation.images.front.bytes"
    data = bytearray(path.read_bytes())
    middle = chunk.data_page_offset + chunk.total_compressed_size // 4
    data[middle : middle + chunk.total_compressed_size // 2] = b"\xff" * (chunk.total_compressed_size // 2)
    path.write_bytes(data)
    text = message(damaged)
    assert text.startswith(f"{path}: damaged (")
    assert "expected the frames of observation.images.front of episodes 2 to 2" in text


def test_an_image_that_is_none(damaged: Path) -> None:
    def change(table: pa.Table) -> pa.Table:
        values = table["observation.images.wrist"].to_pylist()
        values[9]["bytes"] = b"\x89PNG\r\n\x1a\n" + bytes(100)
        column = pa.array(values, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        return replace_column(table, "observation.images.wrist", column)

    rewrite(damaged / DATA, change)
    text = message(damaged)
    assert text.startswith(
        f"{damaged / DATA}: episode 2, frame 3: observation.images.wrist: expected a PNG or"
    )


@pytest.mark.parametrize("column", ["from_timestamp", "chunk_index"])
def test_a_table_that_does_not_place_the_videos(damaged_video: Path, column: str) -> None:
    name = f"videos/observation.images.front/{column}"
    rewrite(damaged_video / EPISODES, lambda table: table.drop_columns([name]))
    text = message(damaged_video)
    assert text.startswith(f"{damaged_video / 'meta/episodes'}: no column {name!r}; did you mean")


@pytest.mark.parametrize("column", ["episode_index", "length"])
def test_an_episode_of_another_length(damaged: Path, column: str) -> None:
    """The data lacks a frame of episode 2, or the table says so."""
    path = damaged / (DATA if column == "episode_index" else EPISODES)
    if column == "episode_index":
        rewrite(path, lambda table: pa.concat_tables([table.slice(0, 9), table.slice(10)]))
        expected, found = 8, 7
    else:

        def change(table: pa.Table) -> pa.Table:
            lengths = table["length"].to_numpy().copy()
            lengths[2] = 9
            return replace_column(table, "length", pa.array(lengths))

        rewrite(path, change)
        expected, found = 9, 8
    text = message(damaged)
    assert f"{damaged / DATA}: episode 2: expected {expected} frames (meta/episodes), found {found}" in text


def test_fewer_episodes_than_announced(damaged: Path) -> None:
    rewrite(damaged / EPISODES, lambda table: table.slice(0, 3))
    text = message(damaged)
    assert str(damaged / "meta/episodes") in text
    assert "expected episodes 0 to 3 in order" in text
    assert "found 3 rows" in text


def test_damaged_metadata(damaged: Path) -> None:
    (damaged / "meta/info.json").write_text('{"fps": 10,')
    assert message(damaged).startswith(f"{damaged / 'meta/info.json'}: not JSON")


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "picture.png").touch()
    text = message(tmp_path)
    assert "not a LeRobotDataset: meta/info.json is missing; found picture.png" in text
    assert message(tmp_path / "nothing").startswith(f"{tmp_path / 'nothing'}: no such folder")


def test_an_older_format(damaged: Path) -> None:
    path = damaged / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"codebase_version": "v1.6"}))
    text = message(damaged)
    assert "LeRobotDataset v1.6; v2.0, v2.1 and v3.0 are read" in text
