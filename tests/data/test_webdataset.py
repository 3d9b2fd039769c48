"""Shards that webdataset's own writer wrote and its own reader reads; what is wrong with one, by name."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from librobot.data.sources.webdataset import WebDatasetSource
from librobot.data.webdataset_writer import WebDatasetWriter
from librobot.errors import LibrobotError
from librobot.types import RobotSpec

Sample = dict[str, Any]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIBROBOT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def samples(episode: str, length: int, first: int = 0) -> list[Sample]:
    """As somebody else's recorder may write them: JPEG, double precision, joints in JSON."""
    generator = np.random.default_rng(length)
    return [
        {
            "__key__": f"{episode}-{first + step}",
            "top.jpg": np.full((8, 12, 3), 10 * step, np.uint8),
            "action.npy": generator.normal(size=2),
            "json": {"prompt": f"{episode} {step // 2}", "joints": [step, 0.1]},
        }
        for step in range(length)
    ]


def write(path: Path, *episodes: list[Sample]) -> Path:
    with webdataset.TarWriter(str(path)) as writer:  # type: ignore[attr-defined]
        for sample in [each for episode in episodes for each in episode]:
            writer.write(sample)
    return path


def test_what_webdataset_wrote_is_read_in_any_order(tmp_path: Path, cache: Path) -> None:
    first, second = samples("a", 3), samples("run-b", 12)
    write(tmp_path / "x-2.tar", first, second[:5])
    write(tmp_path / "x-10.tar", second[5:], samples("c", 1))
    source = WebDatasetSource(tmp_path, state=["json:joints"], control_hz=5)
    source = pickle.loads(pickle.dumps(source))
    assert source.episode_lengths.tolist() == [3, 12, 1]
    wanted = [*first, *second, *samples("c", 1)]
    rows = np.array([14, 2, 7, 7, 0])
    expected = np.array([wanted[row]["action.npy"] for row in rows])
    np.testing.assert_array_equal(source.actions(rows), expected.astype(np.float32))
    np.testing.assert_array_equal(
        source.states(rows), [np.float32(wanted[row]["json"]["joints"]) for row in rows]
    )
    assert source.prompts(rows) == [wanted[row]["json"]["prompt"] for row in rows]
    for frame, row in zip(source.images(rows)["top"], rows, strict=True):
        assert np.abs(frame.astype(int) - wanted[row]["top.jpg"].transpose(2, 0, 1)).max() <= 2
    assert (source.spec.camera_names, source.spec.control_hz) == (("top",), 5)
    assert len(list((cache / "webdataset").iterdir())) == 2
    with pytest.MonkeyPatch.context() as patch:  # what was read once is not read through again
        patch.setattr("librobot.data.sources.webdataset.scan_shard", lambda *_: pytest.fail("read"))
        assert len(WebDatasetSource(tmp_path, state=["json:joints"]).episode_lengths) == 3
    assert WebDatasetSource(tmp_path).spec.state_dim == 0


def test_webdataset_reads_what_is_written(
    tmp_path: Path, spec: RobotSpec, episodes: list[dict[str, Any]]
) -> None:
    writer = WebDatasetWriter(tmp_path / "w", spec, shard_bytes=30_000)
    for episode in episodes:
        writer.add_episode(**episode)
    writer.finalize()
    shards = sorted(str(path) for path in (tmp_path / "w").glob("*.tar"))
    assert len(shards) > 1
    read = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))  # type: ignore[attr-defined]
    assert [sample["__key__"] for sample in read[:6]] == [
        *(f"000000-00000{step}" for step in range(5)),
        "000001-000000",
    ]
    states = np.concatenate([episode["state"] for episode in episodes])
    np.testing.assert_array_equal(np.stack([sample["state.npy"] for sample in read]), states)
    frames = np.concatenate([episode["images"]["wrist"] for episode in episodes])
    np.testing.assert_array_equal(np.stack([sample["wrist.png"] for sample in read]), frames)
    assert read[0]["json"] == {"prompt": episodes[0]["task"], "last": False}
    assert WebDatasetSource(tmp_path / "w").spec == spec


def test_a_killed_writer_goes_on(tmp_path: Path, spec: RobotSpec, episodes: list[dict[str, Any]]) -> None:
    """Whatever follows the last episode that counts is cut off."""
    whole = WebDatasetWriter(tmp_path / "whole", spec)
    for episode in episodes[:2]:
        whole.add_episode(**episode)
    whole.finalize()
    cut = WebDatasetWriter(tmp_path / "cut", spec)
    cut.add_episode(**episodes[0])
    with (tmp_path / "cut/shard-000000.tar").open("ab") as file:
        file.write(b"half an episode")
    again = WebDatasetWriter(tmp_path / "cut", spec)
    assert again.num_episodes == 1
    again.add_episode(**episodes[1])
    again.finalize()
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()


def changed(path: Path, change: Callable[[tarfile.TarInfo, bytes], tuple[str, bytes] | None]) -> None:
    """The shard again with each member as `change` gives it, None to leave it out."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            if (kept := change(member, data)) is not None:
                info = tarfile.TarInfo(kept[0])
                info.size = len(kept[1])
                tar.addfile(info, io.BytesIO(kept[1]))


def npy(value: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


BROKEN: dict[str, tuple[str, Any, str]] = {
    "missing": ("b-2.action.npy", None, r"d.tar: b-2: no member 'action.npy'; found json, top.jpg"),
    "ragged": ("b-1.action.npy", npy(np.zeros(3)), r"d.tar: b-1: action: expected 2 as in .*found 3"),
    "shape": (
        "b-1.action.npy",
        npy(np.zeros((1, 2))),
        r"b-1: action.npy: expected numbers \(dims,\), .*\(1, 2\)",
    ),
    "cut": ("b-1.action.npy", npy(np.zeros(2))[:-4], r"b-1: action.npy: "),
    "not finite": ("b-1.action.npy", npy(np.array([0, np.nan])), r"d.tar: b: episode 1, frame 1: action.npy"),
    "json": ("b-0.json", b"{", r"d.tar: b-0: json: not JSON"),
    "prompt": ("b-0.json", b"{}", r"d.tar: b-0: json: no 'prompt'; found \[\]"),
    "camera": ("b-0.top.jpg", None, r"d.tar: b-0: cameras: expected \['top'\] as .*found \[\]"),
}


@pytest.mark.parametrize("wrong", BROKEN)
def test_what_is_wrong_with_an_episode(tmp_path: Path, wrong: str) -> None:
    name, data, message = BROKEN[wrong]
    path = write(tmp_path / "d.tar", samples("a", 3), samples("b", 4), samples("c", 2))
    changed(path, lambda m, own: (m.name, own) if m.name != name else None if data is None else (name, data))
    with pytest.raises(LibrobotError, match=message):
        WebDatasetSource(tmp_path)
    for _ in range(2):  # reported also when what was read is kept
        with pytest.warns(UserWarning, match=r"1 of 3 episodes are left out .*on_error=skip"):
            source = WebDatasetSource(tmp_path, on_error="skip")
    assert source.episode_lengths.tolist() == [3, 2]
    assert source.prompts(np.array([3])) == ["c 0"]
    assert source.images(np.array([3]))["top"].max() <= 2


def test_steps_that_are_missing_or_come_twice(tmp_path: Path) -> None:
    write(tmp_path / "d.tar", samples("a", 3), samples("b", 2) + samples("b", 2, first=3))
    with pytest.raises(LibrobotError, match=r"d.tar: b: step 2 is missing"):
        WebDatasetSource(tmp_path)
    write(tmp_path / "d.tar", samples("a", 3))
    write(tmp_path / "e.tar", samples("b", 1), samples("a", 2))
    with pytest.raises(LibrobotError, match=r"e.tar: a: an earlier shard has this episode"):
        WebDatasetSource(tmp_path)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.97])
def test_a_shard_cut_short(tmp_path: Path, share: float) -> None:
    """Wherever it ends: in a header, in the bytes of a picture, between two members."""
    write(tmp_path / "a.tar", samples("a", 3))
    path = write(tmp_path / "d.tar", samples("b", 4), samples("c", 4))
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for at in {int(end * share), int(end * share) // 512 * 512}:
        path.write_bytes(whole[:at])
        with pytest.raises(
            LibrobotError, match=rf"d.tar: cut short \({at} bytes\).*; it ends in episode [bc]"
        ):
            WebDatasetSource(tmp_path)
        with pytest.warns(UserWarning, match="are left out"):
            source = WebDatasetSource(tmp_path, on_error="skip")
        assert source.episode_lengths.tolist() == [3] if share < 0.9 else [3, 4]


def test_what_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(LibrobotError, match=r"expected tar shards '\*.tar', found cache|nothing"):
        WebDatasetSource(tmp_path)
    (tmp_path / "d.tar").write_bytes(b"x" * 2000)
    with pytest.raises(LibrobotError, match=r"d.tar: expected an uncompressed tar file, found 2000 bytes"):
        WebDatasetSource(tmp_path)
    write(tmp_path / "d.tar", [{"__key__": "first", "action.npy": np.zeros(2)}])
    with pytest.raises(LibrobotError, match=r"first.action.npy: expected a sample's name, EPISODE-STEP"):
        WebDatasetSource(tmp_path)
    with pytest.raises(ValueError, match="with the groups episode and step"):
        WebDatasetSource(tmp_path, key="(?P<episode>.*)")
    write(tmp_path / "d.tar", samples("a", 2))
    with pytest.raises(LibrobotError, match=r"pictures: front: no pictures 'tip'; did you mean 'top'"):
        WebDatasetSource(tmp_path, pictures={"front": "tip"})
    changed(
        tmp_path / "d.tar", lambda m, own: (m.name, own if "jpg" not in m.name or "a-0" in m.name else b"?")
    )
    source = WebDatasetSource(tmp_path, pictures={"front": "top.jpg"})
    with pytest.raises(LibrobotError, match=r"d.tar: byte \d+: expected a picture of 1 bytes"):
        source.images(np.array([1]))


def test_cameras_that_webdataset_would_mix_up(tmp_path: Path, spec: RobotSpec) -> None:
    from librobot.types import Camera

    for names in (("Top", "top"), ("a/b",)):
        cameras = tuple(Camera(name, 4, 4) for name in names)
        with pytest.raises(ValueError, match="only letters, digits"):
            WebDatasetWriter(tmp_path / "w", RobotSpec("x", cameras, (), spec.action, 5.0))
    assert not (tmp_path / "w").exists()
