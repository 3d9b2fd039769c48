import json

from librobot.bench import train

SMALLER = ["vlm.hidden_size=32", "vlm.num_layers=1", "vlm.tower.channels=16", "vlm.tower.num_keypoints=8"]


def test_every_variant_is_beside_the_bare_run(tmp_path, capsys):
    output = tmp_path / "train.json"
    options = ["--batch-size=2", "--steps=3", "--warmup=1", "--rounds=1", "--save-every=2"]
    variants = ["EMA", "parts of the loss", "activations", "checkpoints"]
    rows = train.main([*options, f"--output={output}", "--variants", *variants, "--", *SMALLER])
    written = json.loads(output.read_text())["rows"]
    assert [row["name"] for row in written] == variants
    assert len({row.peer for row in rows}) == 1
    assert all(row.ratio > 0 for row in rows)
    assert "round 1/1: bare" in capsys.readouterr().out
