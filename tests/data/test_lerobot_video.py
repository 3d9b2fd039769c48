"""A dataset that lerobot itself recorded, two large cameras as video and two tasks, trains by one command."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lerobot_written import JOINTS, write_with_lerobot

pytest.importorskip("lerobot")

LENGTHS = (9, 7, 8)
ACTION = ["x", "y", "z", "yaw", "gripper"]
TINY = (
    "framework.width=32",
    "framework.num_heads=2",
    "framework.feedforward_width=32",
    "framework.num_encoder_layers=1",
    "framework.num_decoder_layers=1",
    "framework.num_vae_layers=1",
    "framework.horizon=8",
    "vlm.num_layers=1",
    "vlm.hidden_size=32",
    "vlm.mlp_width=32",
    "data.batch_size=4",
    "data.num_workers=1",
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lerobot") / "dataset"
    return write_with_lerobot(root, 480, 640, LENGTHS, video=True, action=ACTION)


def train(root: Path, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [
        *(sys.executable, "-m", "librobot.cli.train", "data=lerobot", f"data.root={root}", *TINY),
        *("data.image_size=[64,64]", "trainer.max_steps=2", f"run_dir={folder / 'run'}", *overrides),
    ]
    environment = os.environ | {"LIBROBOT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("data.cache=memmap", "data.cameras=[side_cam]")])
def test_it_trains(recorded: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    done = train(recorded, tmp_path, *overrides)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["step"] == 2
    losses = [value for name, value in metrics.items() if "loss" in name]
    assert losses
    assert all(math.isfinite(value) and value > 0 for value in losses)

    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    spec = checkpoint["librobot"]["spec"]
    cameras = ["side_cam"] if overrides else ["top", "side_cam"]
    assert spec["name"] == "so100_follower"
    assert spec["control_hz"] == 30
    assert [(camera["name"], camera["height"], camera["width"]) for camera in spec["cameras"]] == [
        (name, 64, 64) for name in cameras
    ]
    assert [dim["name"] for dim in spec["state"]] == list(JOINTS)
    assert [dim["name"] for dim in spec["action"]] == ACTION
    provenance = checkpoint["librobot"]["provenance"]
    assert provenance["root"] == str(recorded)
    assert (provenance["episodes"], provenance["frames"]) == (3, 24)
    # The normalizer was fitted on this dataset: its actions are around 3.
    (offset,) = [value for name, value in checkpoint["state_dict"].items() if name.endswith("action_offset")]
    assert offset.shape == (5,)
    assert ((offset - 3).abs() < 2).all()
    cached = list((tmp_path / "cache").rglob("*.npy"))
    assert [path.parent.name for path in cached] == (["side_cam"] if overrides else [])


@pytest.mark.slow
def test_a_robot_with_other_cameras_is_one_message(recorded: Path, tmp_path: Path) -> None:
    done = train(recorded, tmp_path, "robot=so100")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    assert f"{recorded} does not fit robot 'so100'" in done.stderr
    assert "cameras is [side_cam, top] in the dataset, [front, wrist] in the robot" in done.stderr
