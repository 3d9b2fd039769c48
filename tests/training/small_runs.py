"""A small dataset on disk, overrides that make a run tiny, and runs: in this process or as the command."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from omegaconf import open_dict

from librobot.config.compose import compose, read, write
from librobot.data.writer import LeRobotWriter
from librobot.training.launch import place
from librobot.training.run import run
from librobot.types import Camera, Dim, RobotSpec

SPEC = RobotSpec(
    name="stick",
    cameras=(Camera("front", 32, 32),),
    state=(Dim("x", "m"), Dim("y", "m")),
    action=(Dim("x", "m"), Dim("y", "m")),
    control_hz=10.0,
)
FRAMES = 48  # of the whole dataset, and so the training samples of an epoch

VLM = ["hidden_size=32", "num_layers=1", "num_heads=2", "num_kv_heads=1", "mlp_width=32", "image_size=32"]
VLM += ["tower.channels=8", "tower.num_blocks=1", "tower.num_keypoints=8"]
ACT = ["width=32", "num_heads=2", "feedforward_width=32", "latent_dim=4"]
ACT += ["num_encoder_layers=1", "num_decoder_layers=1", "num_vae_layers=1"]
GROOT = ["width=32", "mlp_width=16", "num_dit_layers=2", "num_heads=2", "num_fusion_layers=1"]
GROOT += ["num_fusion_heads=2", "num_embodiments=1", "picture_size=null", "picture_crop=1.0"]
PADDING = ["max_state_dim=null", "max_action_dim=null"]
SIZES = {"act": ACT, "pi0": ["expert_width=16", *PADDING], "groot_n17": [*GROOT, *PADDING]}
SIZES["openvla_oft"] = ["num_blocks=1"]
RUN = ["framework.horizon=4", "data.batch_size=4", "data.num_workers=0", "trainer.log_every_n_steps=1"]
RUN += ["scheduler.warmup_steps=1", "scheduler.decay_steps=4"]


def tiny(framework: str = "act") -> list[str]:
    """A framework, or "pi0:qwen2vl_tiny" for one over a backbone whose option is small already."""
    framework, _, backbone = framework.partition(":")
    vlm = [f"vlm={backbone}"] if backbone else [f"vlm.{size}" for size in VLM]
    own = [f"framework.{size}" for size in SIZES[framework]]
    return ["data=lerobot", f"framework={framework}", *vlm, *own, *RUN]


def write_dataset(root: Path, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    with LeRobotWriter(root, SPEC, fps=10) as writer:
        for _ in range(4):
            writer.add_episode(
                images={"front": random.integers(0, 255, (FRAMES // 4, 32, 32, 3), dtype=np.uint8)},
                state=random.normal(size=(FRAMES // 4, 2)).astype(np.float32),
                action=random.normal(size=(FRAMES // 4, 2)).astype(np.float32),
                task="reach the red cube",
            )
    return root


def fit(dataset: Path, run_dir: Path, *overrides: str, framework: str = "act") -> dict[str, float]:
    """What librobot-train does, in this process; returns the final metrics."""
    own = [f"data.root={dataset}", f"run_dir={run_dir}", "name=tiny"]
    cfg = compose([*tiny(framework), *own, *overrides])
    with open_dict(cfg):
        place(cfg)
    return run(read(write(cfg, run_dir / "config.yaml")))


def start(*arguments: str, cwd: Path) -> subprocess.Popen:
    """librobot-train in its own process."""
    command = [sys.executable, "-m", "librobot.cli.train", *arguments]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def train(*arguments: str, cwd: Path, timeout: float = 600) -> subprocess.CompletedProcess:
    process = start(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def rows(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv, every value as it is written."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(run_dir: Path) -> list[str]:
    return [row["train/loss"] for row in rows(run_dir)]
