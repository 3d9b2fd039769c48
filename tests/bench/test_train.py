import itertools
import json

import pytest

from librobot.bench import train

SMALLER = ["vlm.hidden_size=32", "vlm.num_layers=1", "vlm.tower.channels=16", "vlm.tower.num_keypoints=8"]


def test_every_variant_is_beside_the_bare_run(tmp_path, capsys):
    output = tmp_path / "train.json"
    options = ["--batch-size=2", "--steps=3", "--warmup=1", "--rounds=1", "--save-every=2"]
    variants = ["EMA", "parts of the loss", "activations", "checkpoints"]
    rows = train.main([*options, f"--output={output}", "--variants", *variants, "--", *SMALLER])
    written = json.loads(output.read_text())["rows"]
    assert [row["name"] for row in written] == variants
    assert len({row.peer for row in rows[:-1]}) == 1
    assert rows[-1].peer_name == "the same run's steps far from a save"
    assert all(row.ratio > 0 for row in rows)
    assert "round 1/1: bare" in capsys.readouterr().out


def test_a_save_is_told_from_the_steps_that_follow_it():
    """Of 12 steps of 10 ms, those after the 4th and the 8th take 14: 1 ms for each step of a stretch of 4."""
    durations = [0.014 if number in (5, 9) else 0.010 for number in range(1, 13)]
    found = train.between_saves(list(itertools.accumulate(durations)), every=4)
    assert found == [pytest.approx((11, 10)), pytest.approx((11, 10))]
    assert train.row_of_saves("checkpoints", found).ratio == pytest.approx(1.1)
