"""librobot-data inspect: what the page shows, that its videos are the episodes, and bad input."""

from __future__ import annotations

import base64
import io
import re

import av
import numpy as np
import pytest

from librobot.data.page import encode_video, write_page
from librobot.data.sources.synthetic import synthetic
from librobot.errors import LibrobotError


@pytest.fixture(scope="module")
def source():
    return synthetic(
        episodes=5,
        length=(12, 20),
        state_dim=3,
        action_dim=3,
        height=48,
        width=64,
        prompts=["open <it>", "go"],
    )


def decoded(video: bytes) -> np.ndarray:
    with av.open(io.BytesIO(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_the_page(source, tmp_path):
    target = write_page(source, tmp_path / "page.html", episodes=[0, 3], show=False)
    page = target.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert page.count("<section class=episode>") == 2
    assert "open &lt;it&gt;" in page
    assert "<it>" not in page
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    videos = re.findall(r"data:video/mp4;base64,([A-Za-z0-9+/=]+)", page)
    assert len(videos) == 4
    first = int(source.episode_lengths[:3].sum())
    rows = first + np.arange(int(source.episode_lengths[3]))
    frames = decoded(base64.b64decode(videos[2]))
    assert frames.shape == (len(rows), 48, 64, 3)
    expected = source.images(rows)["front"].transpose(0, 2, 3, 1).astype(float)
    assert np.abs(frames - expected).mean() < 30  # compressed, in half the colours
    assert np.abs(frames[::-1] - expected).mean() > 40
    mean = source.statistics()["action"]["mean"][0]
    assert f"<td>{mean:.4g}" in page
    assert page.count("<polyline") == 2 * (3 + 3)


def test_episodes_are_spread(source, tmp_path):
    page = write_page(source, tmp_path / "page.html", show=False).read_text()
    assert re.findall(r"<h3>Episode (\d+)", page) == ["0", "1", "2", "3", "4"]


def test_problems_stand_on_the_page(source, tmp_path):
    broken = synthetic(episodes=2, length=(12, 12), state_dim=3, action_dim=3, height=16, width=16)
    frames = broken.images
    broken.images = lambda rows: {name: 0 * images for name, images in frames(rows).items()}
    page = write_page(broken, tmp_path / "page.html", show=False).read_text()
    assert "<b>black</b>: camera front, episode 0: every picture looked at is black" in page
    assert page.count("<b>black</b>: every picture looked at is black") == 4


def test_large_pictures_become_small():
    frames = np.random.default_rng(0).integers(0, 255, (3, 3, 480, 641), dtype=np.uint8)
    assert decoded(encode_video(frames, 29.97)).shape == (3, 240, 320, 3)


def test_bad_input(source, tmp_path):
    with pytest.raises(LibrobotError, match="the dataset has episodes 0 to 4, found 7"):
        write_page(source, tmp_path / "page.html", episodes=[7], show=False)
    with pytest.raises(LibrobotError, match="its folder does not exist"):
        write_page(source, tmp_path / "none" / "page.html", show=False)
    with pytest.raises(LibrobotError, match="it is a folder"):
        write_page(source, tmp_path, show=False)
