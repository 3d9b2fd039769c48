"""Replay buffers as diffusion_policy writes them, by the zarr library."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr

from librobot.data.sources.zarr import ZarrSource
from librobot.data.sources.zarr_files import ZarrArray, ZarrStore
from librobot.errors import LibrobotError

LENGTHS = (7, 1, 12)
DISK = numcodecs.Blosc("zstd", clevel=5, shuffle=numcodecs.Blosc.BITSHUFFLE)
LZ4 = numcodecs.Blosc(cname="lz4", clevel=5, shuffle=numcodecs.Blosc.NOSHUFFLE)


def content() -> dict[str, np.ndarray]:
    generator, total = np.random.default_rng(1), sum(LENGTHS)
    return {
        "img": generator.integers(0, 256, (total, 9, 10, 3)).astype(np.float32),  # as in Push-T
        "wrist": generator.integers(0, 256, (total, 6, 8, 3)).astype(np.uint8),
        "state": generator.normal(size=(total, 5)).astype(np.float32),
        "action": generator.normal(size=(total, 2)),
        "keypoint": generator.normal(size=(total, 9, 2)).astype(np.float32),
    }


def write(path: Path, arrays: dict[str, np.ndarray], compressor: Any = DISK, chunk: int = 3) -> Path:
    """ReplayBuffer.add_episode grows every array; the chunks cut through episodes."""
    root = zarr.open_group(str(path), mode="w", zarr_format=2)
    data, meta = root.create_group("data"), root.create_group("meta")
    for key, value in arrays.items():
        chunks = (chunk, *value.shape[1:])
        array = data.create_array(
            key, shape=value.shape, chunks=chunks, dtype=value.dtype, compressors=compressor, fill_value=0
        )
        array[:] = value
    ends = np.cumsum(LENGTHS)
    stored = meta.create_array(
        "episode_ends", shape=ends.shape, chunks=ends.shape, dtype="int64", compressors=None
    )
    stored[:] = ends
    return path


@pytest.mark.parametrize("compressor", [DISK, LZ4, None])
@pytest.mark.parametrize("zipped", [False, True])
def test_every_value_is_what_was_written(tmp_path: Path, compressor: Any, zipped: bool) -> None:
    arrays = content()
    path = write(tmp_path / "push_t.zarr", arrays, compressor)
    if zipped:
        path = Path(shutil.make_archive(str(tmp_path / "push_t"), "zip", path))
    source = pickle.loads(pickle.dumps(ZarrSource(path, control_hz=10)))
    rows = np.arange(sum(LENGTHS))
    assert source.episode_lengths.tolist() == list(LENGTHS)
    np.testing.assert_array_equal(source.states(rows), arrays["state"])
    np.testing.assert_array_equal(source.actions(rows), arrays["action"].astype(np.float32))
    assert source.spec.camera_names == ("img", "wrist")
    order = np.random.default_rng(0).permutation(rows)
    images = source.images(order)
    for key in ("img", "wrist"):
        np.testing.assert_array_equal(images[key].transpose(0, 2, 3, 1), arrays[key][order].astype(np.uint8))
    assert set(source.prompts(rows)) == {"push t"}


def test_chunks_across_every_axis_and_missing_ones(tmp_path: Path) -> None:
    values = np.arange(7 * 5 * 4).reshape(7, 5, 4)
    root = zarr.open_group(str(tmp_path / "a"), mode="w", zarr_format=2)
    array = root.create_array(
        "x", shape=values.shape, chunks=(2, 3, 3), dtype="<i4", fill_value=-1, order="F"
    )
    array[:5] = values[:5]
    found = ZarrArray(ZarrStore(tmp_path / "a"), "x")
    np.testing.assert_array_equal(found.all(), root["x"][:])
    assert (found.all()[6] == -1).all()


def test_keys_are_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "x.zarr", content())
    source = ZarrSource(path, state=[], action=["state", "action"], pictures={"front": "img"}, prompt="push")
    assert (source.spec.state_dim, source.spec.action_dim) == (0, 7)
    assert source.spec.action[5].name == "action_0"
    assert source.spec.camera_names == ("front",)
    assert source.prompts(np.array([3])) == ["push"]


def test_what_is_wrong_names_the_array(tmp_path: Path) -> None:
    path = write(tmp_path / "x.zarr", content())
    with pytest.raises(LibrobotError, match=r"no array data/actions; did you mean 'action'"):
        ZarrSource(path, action=["actions"])
    with pytest.raises(LibrobotError, match=r"data/keypoint: expected a vector .* \(20, 9, 2\)"):
        ZarrSource(path, state=["keypoint"])
    with pytest.raises(LibrobotError, match=r"data/keypoint: expected pictures"):
        ZarrSource(path, pictures={"a": "keypoint"})
    chunk = path / "data/state/2.0"
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(LibrobotError, match=r"data/state/2.0: damaged"):
        ZarrSource(path)
    meta = path / "data/action/.zarray"
    described = json.loads(meta.read_text())
    meta.write_text(json.dumps(described | {"compressor": {"id": "imagecodecs_jpegxl"}}))
    with pytest.raises(LibrobotError, match=r"data/action: compressed by 'imagecodecs_jpegxl'"):
        ZarrSource(path, state=[])
    meta.write_text(json.dumps(described | {"shape": [12, 2]}))
    with pytest.raises(LibrobotError, match=r"data/action: expected 20 steps .* found 12"):
        ZarrSource(path, state=[])
    with pytest.raises(LibrobotError, match="no such file or folder"):
        ZarrSource(tmp_path / "nothing.zarr")
    zarr.open_group(str(tmp_path / "v3"), mode="w", zarr_format=3)
    with pytest.raises(LibrobotError, match="Zarr v3, v2 is read"):
        ZarrSource(tmp_path / "v3")


def test_pictures_of_other_ranges_are_refused(tmp_path: Path) -> None:
    arrays = content()
    arrays["img"] = arrays["img"] / 255
    with pytest.raises(LibrobotError, match="must hold 0 to 255"):
        ZarrSource(write(tmp_path / "x.zarr", arrays))
