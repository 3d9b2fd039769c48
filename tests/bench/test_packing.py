import json

from librobot.bench import packing

SMALLER = ["vlm.hidden_size=32", "vlm.num_layers=1", "vlm.mlp_width=32", "head.tokenizer.vocab_size=300"]


def test_tokens_and_times_are_beside_those_of_padded_rows(tmp_path):
    output = tmp_path / "packing.json"
    options = ["--model=tiny", "--batch-size=4", "--batches=2", "--rounds=1", "--warmup=0"]
    rows = packing.main([*options, f"--output={output}", *SMALLER])
    written = json.loads(output.read_text())["rows"]
    assert [(row["unit"], row["peer_name"]) for row in written] == [
        (unit, peer) for unit in ("tokens", "ms") for peer in ("padded rows", "padded rows of like length")
    ]
    assert all(row.ratio > 0 for row in rows)
    assert rows[0].ratio < 0.95
    assert rows[0].ratio <= rows[1].ratio <= 1.0
