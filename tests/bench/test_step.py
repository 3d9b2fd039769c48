import json

import pytest

from librobot.bench import step
from librobot.bench._rows import Row

SMALLER = ["vlm.hidden_size=32", "vlm.num_layers=1", "vlm.tower.channels=16", "vlm.tower.num_keypoints=8"]


def test_rows_of_both_sides_are_written(tmp_path, capsys):
    output = tmp_path / "step.json"
    options = ["--framework", "act", "--batch-size=2", "--steps=2", "--warmup=1", "--rounds=2"]
    (row,) = step.main([*options, f"--output={output}", *SMALLER])
    found = json.loads(output.read_text())
    assert set(found) == {"rows", "machine", "versions", "command", "date"}
    (written,) = found["rows"]
    assert set(written) == {"name", "ours", "peer", "peer_name", "ratio", "unit", "goal"}
    assert written["ratio"] == pytest.approx(row.ours / row.peer)
    assert written["goal"] == 1.05
    assert min(row.ours, row.peer) > 0
    assert written["peer_name"] == "bare PyTorch loop"
    assert str(output) in capsys.readouterr().out.replace("\n", "")


def test_both_sides_train_the_same_weights(tmp_path):
    cfg = step.configuration("act", str(tmp_path), 3, SMALLER)
    first, second = (step.make_framework(cfg).state_dict() for _ in range(2))
    assert all((first[name] == second[name]).all() for name in first)


def test_warm_up_is_left_out():
    ends = [10.0, 11.0, 11.5, 12.0]
    assert step.mean_step(ends, warmup=2) == pytest.approx(500.0)


def test_ratio_is_ours_over_peer():
    assert Row("x", 3.0, 2.0, "peer", "ms").ratio == 1.5
