"""A small dataset on disk, and overrides that make every run tiny."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from librobot.data.writer import LeRobotWriter
from librobot.types import Camera, Dim, RobotSpec

SPEC = RobotSpec(
    name="stick",
    cameras=(Camera("front", 32, 32),),
    state=(Dim("x", "m"), Dim("y", "m")),
    action=(Dim("x", "m"), Dim("y", "m")),
    control_hz=10.0,
)

VLM = ["vlm.hidden_size=32", "vlm.num_layers=1", "vlm.num_heads=2", "vlm.num_kv_heads=1", "vlm.mlp_width=32"]
VLM += ["vlm.image_size=32", "vlm.tower.channels=8", "vlm.tower.num_blocks=1", "vlm.tower.num_keypoints=8"]
ACT = [
    "framework.width=32",
    "framework.num_heads=2",
    "framework.feedforward_width=32",
    "framework.latent_dim=4",
]
ACT += ["framework.num_encoder_layers=1", "framework.num_decoder_layers=1", "framework.num_vae_layers=1"]
RUN = ["framework.horizon=4", "data.batch_size=4", "data.num_workers=0", "trainer.log_every_n_steps=1"]
TINY = ["data=lerobot", *VLM, *ACT, *RUN]


def write_dataset(root: Path, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    with LeRobotWriter(root, SPEC, fps=10) as writer:
        for _ in range(4):
            writer.add_episode(
                images={"front": random.integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)},
                state=random.normal(size=(12, 2)).astype(np.float32),
                action=random.normal(size=(12, 2)).astype(np.float32),
                task="reach the red cube",
            )
    return root


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "stick")


def start(*arguments: str, cwd: Path) -> subprocess.Popen:
    """librobot-train in its own process."""
    command = [sys.executable, "-m", "librobot.cli.train", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def train(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    process = start(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
