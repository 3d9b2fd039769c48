"""Published weights over several processes: each reads its own parts from the files, and holds no more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from together import free_port
from weights_in_parts import MESHES, configuration

from librobot.config.build import build

HERE = Path(__file__).parent
MB = 2**20
SLACK = 8 * MB  # modules, the files' headers, what malloc keeps


@pytest.mark.slow
def test_no_process_holds_more_than_its_part_of_published_weights(tmp_path):
    """A Qwen2-VL of 60 MB in eight files, under names that transformers converts when it loads them."""
    folder = tmp_path / "published"
    vlm = build(large().vlm, "vlm")
    vlm.model.save_pretrained(folder, max_shard_size="8MB")
    for part in (vlm.tokenizer, vlm.picture_processor):
        part.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 4
    found = in_two_processes(folder, tmp_path)
    print(json.dumps(found, indent=1))
    for trainer in MESHES:
        for rank in (0, 1):
            numbers = found[rank][trainer]
            assert numbers["differ"] == numbers["left"] == []
            assert numbers["whole"] > 50 * MB
            most = numbers["whole"] / 2 + numbers["largest"]
            assert numbers["read"] <= most
            assert numbers["held"] > 0.9 * numbers["read"]
            assert numbers["held"] <= most + SLACK < 0.75 * numbers["whole"]
    both = found[0]["fsdp2"]["read"] + found[1]["fsdp2"]["read"]
    assert both == pytest.approx(found[0]["fsdp2"]["whole"], rel=0.01)  # each number once


def large():
    cfg = configuration("cpu", "anywhere")
    cfg.vlm.pretrained = False
    return cfg


def in_two_processes(folder: Path, out: Path) -> list[dict]:
    port = str(free_port())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = [sys.executable, str(HERE / "weights_in_parts.py")]
    running = [
        subprocess.Popen(
            [*script, str(rank), port, str(folder), str(out / f"{rank}.json")],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-4000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]
