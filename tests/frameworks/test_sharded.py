"""Every framework gives the same loss and gradients when two processes share its weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_models
from librobot.frameworks.sharding import blocks_of


@pytest.mark.parametrize("name", tiny_models.options("framework"))
def test_the_declared_blocks_are_there(name):
    framework = tiny_models.build(name)
    blocks = blocks_of(framework)
    assert blocks
    assert len(set(map(id, blocks.values()))) == len(blocks)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_framework_over_two_processes():
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sharded_pair.py"))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    assert set(tiny_models.options("framework")) <= {name.split()[0] for name in found}
    assert {name: text for name, text in found.items() if isinstance(text, str)} == {}
    for name, differences in found.items():
        assert differences["loss"] < 1e-5, name
        assert differences["gradients"] < 1e-3, name
        assert differences["compared"] > 10, name
        assert differences["held"] < 0.6, name
