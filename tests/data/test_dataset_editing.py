"""merge, split and filter: what is copied stays as it was, bit for bit; what is written anew says so."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from lerobot_written import write_with_lerobot
from synthetic import make_episode
from test_lerobot_v2 import write_v21

from librobot.cli.data import command
from librobot.data import copying
from librobot.data.convert import convert
from librobot.data.editing import filtered, merged, split, write_parts
from librobot.data.sources.lerobot import LeRobotSource
from librobot.data.sources.zarr import ZarrSource
from librobot.data.writer import LeRobotWriter
from librobot.errors import LibrobotError
from librobot.types import Camera, RobotSpec


def assert_episodes(root: Path, expected: Sequence[tuple[Any, int]]) -> None:
    """`root` holds these episodes (dataset, number), every value and pixel."""
    source = LeRobotSource(root)
    assert source.episode_lengths.tolist() == [int(s.episode_lengths[e]) for s, e in expected]
    begin = 0
    for theirs, episode in expected:
        length = int(theirs.episode_lengths[episode])
        rows = begin + np.arange(length)
        own = int(theirs.episode_lengths[:episode].sum()) + np.arange(length)
        np.testing.assert_array_equal(source.states(rows), theirs.states(own))
        np.testing.assert_array_equal(source.actions(rows), theirs.actions(own))
        assert source.prompts(rows) == theirs.prompts(own)
        for name, frames in theirs.images(own).items():
            np.testing.assert_array_equal(source.images(rows)[name], frames)
        begin += length
    assert not [p for p in root.rglob("*") if ".staging" in str(p) or ".tmp-" in p.name]
    assert [p.name for p in root.parent.iterdir() if "partial" in p.name or "lock" in p.name] == []
    table = pq.read_table(root / "data/chunk-000/file-000.parquet")
    assert table["index"].to_pylist() == list(range(begin))


@pytest.mark.parametrize("kind", ["image", "video"])
def test_two_datasets_become_one(
    tmp_path: Path,
    kind: str,
    spec: RobotSpec,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also with an instruction that changes within an episode; no frame is encoded."""
    first = LeRobotSource(request.getfixturevalue(f"{kind}_dataset"))
    with LeRobotWriter(tmp_path / "b", spec, fps=10, image_format=kind) as writer:  # type: ignore[arg-type]
        for index in (9, 10):
            episode = make_episode(spec, index, 4)
            writer.add_episode(**episode | {"task": ["new", "new", episode["task"], "newer"]})
    second = LeRobotSource(tmp_path / "b")
    monkeypatch.setattr(copying, "encode_video", lambda *_: pytest.fail("encoded"))
    root = write_parts(merged([first, second]), tmp_path / "whole", show=False)
    assert_episodes(root, [*((first, i) for i in range(4)), (second, 0), (second, 1)])
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    theirs = LeRobotDataset("somebody/something", root=root)
    assert theirs[21]["task"] == "new"
    assert theirs[23]["task"] == "newer"
    np.testing.assert_array_equal(theirs[27]["action"].numpy(), second.actions(np.array([7]))[0])
    whole, parts = pq.read_table(root / "meta/episodes"), pq.read_table(first.root / "meta/episodes")
    for name in parts.column_names:
        if name.startswith("stats/") and "index" not in name:
            np.testing.assert_allclose(whole[name].to_pylist()[2], parts[name].to_pylist()[2], rtol=1e-12)


def test_extra_columns_stay_and_must_agree(tmp_path: Path, spec: RobotSpec) -> None:
    for name, extra in (("a", True), ("b", False)):
        with LeRobotWriter(tmp_path / name, spec, fps=10) as writer:
            for index in range(3):
                reward = {"next.reward": np.arange(4, dtype=np.float32), "note": np.array(["x"] * 4)}
                writer.add_episode(**make_episode(spec, index, 4), extra=reward if extra else {})
    a, b = LeRobotSource(tmp_path / "a"), LeRobotSource(tmp_path / "b")
    root = write_parts(filtered(a, episodes="1:"), tmp_path / "c", show=False)
    assert_episodes(root, [(a, 1), (a, 2)])
    table = pq.read_table(root / "data/chunk-000/file-000.parquet")
    assert table["next.reward"].to_pylist() == [0, 1, 2, 3] * 2
    assert set(table["note"].to_pylist()) == {"x"}
    with pytest.raises(LibrobotError, match=r"b: next.reward: expected .* as in .*a, found None.*--rewrite"):
        write_parts(merged([a, b]), tmp_path / "d", show=False)
    assert not list(tmp_path.glob("d*"))
    root = write_parts(merged([a, b]), tmp_path / "d", rewrite=True, show=False)
    assert_episodes(root, [(s, i) for s in (a, b) for i in range(3)])
    assert "next.reward" not in LeRobotSource(root).metadata.features


def test_version_2_becomes_3(tmp_path: Path, spec: RobotSpec, episodes: list[dict[str, Any]]) -> None:
    """Its statistics of pictures lack quantiles, so they are made of the frames."""
    write_v21(tmp_path / "old", spec, episodes)
    old = LeRobotSource(tmp_path / "old")
    root = write_parts(filtered(old, drop="1"), tmp_path / "new", show=False)
    assert_episodes(root, [(old, 0), (old, 2), (old, 3)])
    table = pq.read_table(root / "meta/episodes")
    assert np.shape(table["stats/observation.images.front/q50"].to_pylist()) == (3, 3, 1, 1)


@pytest.mark.slow
def test_what_lerobot_recorded_as_video_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its default encoding, AV1 with a keyframe every second frame: no frame is encoded again."""
    theirs = LeRobotSource(write_with_lerobot(tmp_path / "theirs", 64, 96, (7, 12, 9, 5), video=True))
    monkeypatch.setattr(copying, "encode_video", lambda *_: pytest.fail("encoded"))
    root = write_parts(filtered(theirs, episodes="3,1,2"), tmp_path / "ours", show=False)
    assert_episodes(root, [(theirs, 1), (theirs, 2), (theirs, 3)])


def test_an_episode_that_cannot_be_copied_is_encoded(
    tmp_path: Path, video_dataset: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = LeRobotSource(video_dataset)
    monkeypatch.setattr(copying, "copy_span", lambda *_: False)
    root = write_parts(filtered(source, episodes="0,2"), tmp_path / "new")
    assert "but for 4 videos that had to be encoded anew" in capsys.readouterr().err
    found = LeRobotSource(root).images(np.arange(13))["front"].astype(int)
    theirs = source.images(np.r_[0:5, 6:14])["front"]
    assert np.abs(found - theirs).mean() < 5


@pytest.mark.parametrize("kind", ["image", "video"])
def test_an_interrupted_copy_goes_on(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While episodes are staged, while they are put together, and before the staging folder is removed."""
    source = LeRobotSource(request.getfixturevalue(f"{kind}_dataset"))
    whole = write_parts(filtered(source, drop="0"), tmp_path / "whole", show=False)
    stage, consolidate = copying.EpisodeCopier.stage, copying.consolidate
    staged = []

    def stops(self: Any, episode: int, *rest: Any) -> Any:
        if len(staged) == 2:
            raise KeyboardInterrupt
        staged.append(episode)
        return stage(self, episode, *rest)

    def dies_before(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    def dies_after(*arguments: Any, **options: Any) -> None:
        consolidate(*arguments, **options)
        raise KeyboardInterrupt

    for name, place, change in (
        ("stage", copying.EpisodeCopier, stops),
        ("consolidate", copying, dies_before),
        ("consolidate", copying, dies_after),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, change)
            with pytest.raises(KeyboardInterrupt):
                write_parts(filtered(source, drop="0"), tmp_path / "again", show=False)
        with pytest.raises(LibrobotError, match=r"again.partial: parts of another conversion"):
            write_parts(merged([source]), tmp_path / "again", show=False)
    again = write_parts(filtered(source, drop="0"), tmp_path / "again", show=False)
    for path in (path for path in whole.rglob("*") if path.is_file()):
        assert (again / path.relative_to(whole)).read_bytes() == path.read_bytes()


def test_split_keeps_every_episode_once(tmp_path: Path, image_dataset: Path) -> None:
    source = LeRobotSource(image_dataset)
    parts = split(source, {"val": 0.25, "test": 1}, seed=3)
    assert {name: len(part) for name, part in parts.items()} == {"train": 2, "val": 1, "test": 1}
    assert sorted(episode for part in parts.values() for _, episode in part) == [0, 1, 2, 3]
    assert parts == split(source, {"val": 0.25, "test": 1}, seed=3)
    assert any(parts != split(source, {"val": 0.25, "test": 1}, seed=seed) for seed in range(9))
    root = write_parts(parts, tmp_path / "parts", show=False)
    for name, part in parts.items():
        assert_episodes(root / name, part)
    for wrong in ({"val": 4}, {"val": 0}, {"val": 0.5, "test": 0.5}):
        with pytest.raises(LibrobotError, match=r"has 4 episodes, asked for are .*and train too"):
            split(source, wrong, seed=0)


def numbers(parts: Any) -> list[int]:
    return [episode for _, episode in parts[""]]


def test_filters(tmp_path: Path, spec: RobotSpec, image_dataset: Path) -> None:
    source = LeRobotSource(image_dataset)  # lengths 5 1 8 6; red cube, drawer, button, red cube
    assert numbers(filtered(source, episodes="1:3,-1")) == [1, 2, 3]
    assert numbers(filtered(source, episodes=":2", drop="0")) == [1]
    assert numbers(filtered(source, instruction=["RED", "button"])) == [0, 2, 3]
    assert numbers(filtered(source, instruction=["the"], not_instruction=["cube"])) == [1, 2]
    assert numbers(filtered(source, min_length=5, max_length=6)) == [0, 3]
    assert numbers(filtered(source, clean=True, show=False)) == [0, 2, 3]  # episode 1 has one frame
    for wrong in ("7", "a:b", "1,,2", "-5"):
        with pytest.raises(LibrobotError, match=r"expected a number from 0 to 3 or a range like 0:50"):
            filtered(source, episodes=wrong)
    with pytest.raises(LibrobotError, match="no episode is left"):
        write_parts(filtered(source, min_length=99), tmp_path / "none", show=False)
    assert not list(tmp_path.iterdir())


def test_other_formats_are_written_anew(
    tmp_path: Path, image_dataset: Path, spec: RobotSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    source = LeRobotSource(image_dataset)
    zarr = ZarrSource(convert(source, tmp_path / "z", "zarr", show=False))
    root = write_parts(merged([zarr, source]), tmp_path / "both")
    assert "both: 8 episodes, pictures written anew as PNG" in capsys.readouterr().err
    assert_episodes(root, [(s, i) for s in (zarr, source) for i in range(4)])
    small = RobotSpec("arm", (Camera("front", 16, 16),), spec.state, spec.action, 10.0)
    with LeRobotWriter(tmp_path / "c", small, fps=10) as writer:
        writer.add_episode(**make_episode(small, 0, 2))
    with pytest.raises(LibrobotError, match=r"c: cameras: expected .*wrist.* as in .*z, found .*16"):
        write_parts(merged([zarr, LeRobotSource(tmp_path / "c")]), tmp_path / "d", show=False)


def test_the_commands(
    tmp_path: Path,
    image_dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = LeRobotSource(image_dataset)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["librobot-data", *arguments])
        command()
        return capsys.readouterr().err

    assert "4 episodes, copied as they are" in run("merge", str(image_dataset), "m")
    run("filter", "m", "f", "--instruction", "cube", "--min-length", "6")
    run("split", "m", "s", "--val", "1", "--seed", "1", "state_key=observation.state")
    assert_episodes(tmp_path / "m", [(source, i) for i in range(4)])
    assert_episodes(tmp_path / "f", [(source, 3)])
    assert len(LeRobotSource(tmp_path / "s/train").episode_lengths) == 3


@pytest.mark.parametrize(
    "arguments",
    [["info", "d", "a=b"], ["merge", "a", "b", "c", "--nope"], ["split", "a", "b", "--val", "1", "c"]],
)
def test_unknown_arguments(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["librobot-data", *arguments])
    with pytest.raises(SystemExit):
        command()
    assert f"unrecognized arguments: {arguments[-1]}" in capsys.readouterr().err
