import base64
import io
import json
import re

import av
import numpy as np
import pytest
from rich.console import Console

from librobot.evaluation.episode import EpisodeResult
from librobot.evaluation.report import print_table, write_report
from librobot.evaluation.statistics import summarise
from librobot.evaluation.video import captioned, encode, episode_video


def episodes(successes=3):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (96, 128, 3), dtype=np.uint8) for _ in range(8)]
    kinds = ("reach", "push <it> & more")
    return [
        EpisodeResult(
            i,
            kinds[i % 2],
            1_000_000 + i,
            f"{kinds[i % 2]} cube",
            i < successes,
            7 + i,
            frames if i < 2 else [],
        )
        for i in range(6)
    ]


@pytest.fixture
def result():
    control = summarise(episodes(1))
    return {
        "policy": "run",
        **summarise(episodes()),
        "controls": {"blank_images": control, "shuffled_prompts": {"skipped": "one instruction only"}},
        "latency": {
            "calls": 3,
            "batch_size": {"mean": 2.0, "max": 2},
            "call_ms": {"p50": 5.0, "p95": 9.0},
            "chunk_ms": {"mean": 2.5},
        },
        "checkpoint": "outputs/run/last.ckpt",
        "suite": {"name": "point"},
        "renderer": "mujoco-rays",
        "execution": "8 steps of each chunk of 16",
        "seed": 0,
        "command": "librobot-eval ckpt=outputs/run",
        "date": "2026-01-01T00:00:00+00:00",
        "seconds": 12.3,
        "machine": {"cpu": "two cores"},
        "versions": {"librobot": "0"},
    }


def decode(data):
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)], float(
            stream.average_rate
        )


def test_encode_keeps_size_count_rate_and_colour():
    frames = [np.full((33, 48, 3), (200, 40 + 20 * i, 30), np.uint8) for i in range(5)]
    decoded, rate = decode(encode(frames, 10.0))
    assert (len(decoded), rate) == (5, 10.0)
    assert decoded[0].shape == (32, 48, 3)  # an odd edge loses its last row
    for before, after in zip(frames, decoded, strict=True):
        assert np.abs(before[0, 0].astype(int) - after.mean((0, 1))).max() < 12


def test_episode_video_shows_the_outcome_at_the_end_only():
    won, lost = episodes()[0], episodes(0)[0]
    frames, _ = decode(episode_video(won, 10.0))
    assert len(frames) == 8 + 10  # the last picture is held for a second
    middle = captioned(won.frames[0], won, step=0, ended=False)
    assert (middle == captioned(lost.frames[0], lost, step=0, ended=False)).all()
    assert (middle[:96] == won.frames[0]).all()
    ends = [captioned(e.frames[0], e, step=7, ended=True) for e in (won, lost)]
    assert (ends[0] != ends[1]).any()


def test_page_is_one_self_contained_file(tmp_path, result):
    page = write_report(tmp_path, result, episodes(), fps=10, config="env: <b>point</b>")
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text)
    assert "@import" not in text
    assert "url(http" not in text
    videos = re.findall(r'src="data:video/mp4;base64,([^"]+)"', text)
    assert len(videos) == 2
    assert all(len(decode(base64.b64decode(video))[0]) == 18 for video in videos)
    assert text.count("<svg") == 2
    assert "push &lt;it&gt; &amp; more" in text  # names are escaped
    assert "&lt;b&gt;point" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:href="#|url\(#)([^")]+)', text):
        assert target in ids
    for shown in ("50.0%", "one instruction only", "outputs/run/last.ckpt", "mujoco-rays", "two cores"):
        assert shown in text


def test_json_and_video_files(tmp_path, result):
    write_report(tmp_path, result, episodes(), fps=10)
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["success"] == 0.5
    assert found["episodes"] == 6
    assert found["interval"] == pytest.approx([0.1876, 0.8124], abs=1e-3)
    assert set(found["tasks"]) == {"reach", "push <it> & more"}
    assert found["controls"]["blank_images"]["success"] == pytest.approx(1 / 6)
    assert [(tmp_path / name).is_file() for name in found["videos"]] == [True, True]
    assert not list(tmp_path.rglob("*.partial"))


def test_printed_table_names_everything(tmp_path, result):
    console = Console(file=io.StringIO(), width=120)
    print_table(result, tmp_path / "report.html", console)
    text = console.file.getvalue()
    for shown in (
        "reach",
        "all kinds",
        "50%",
        "19 to 81%",
        "17%",
        "not run: one instruction only",
        "report.html",
    ):
        assert shown in text
