"""pi0 trains on every published family, at a small size, and goes on where it stopped."""

import statistics
from pathlib import Path

import numpy as np
import pytest
from omegaconf import open_dict
from small_runs import RUN, losses, rows, train

import tiny_models
from librobot.config.compose import compose, read, write
from librobot.policy import Policy
from librobot.training.launch import place
from librobot.training.run import run

FAMILIES = [name for name in tiny_models.options("vlm") if name.endswith("_tiny")]
PI0 = ["data=lerobot", "framework=pi0", "framework.expert_width=32", "framework.max_state_dim=null"]
PI0 += ["framework.max_action_dim=null", *RUN, "data.batch_size=24", "optim.lr=5e-3", "name=tiny"]


def fit(dataset: Path, run_dir: Path, *overrides: str) -> None:
    cfg = compose([*PI0, f"data.root={dataset}", f"run_dir={run_dir}", *overrides])
    with open_dict(cfg):
        place(cfg)
    run(read(write(cfg, run_dir / "config.yaml")))


@pytest.mark.parametrize("name", FAMILIES)
def test_ten_steps_lower_the_loss_and_five_and_five_are_ten(name, dataset, tmp_path):
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    overrides = [f"vlm={name}", "scheduler.decay_steps=10"]
    fit(dataset, straight, *overrides, "trainer.max_steps=10", "data.num_workers=1")  # its processor travels
    fit(dataset, parts, *overrides, "trainer.max_steps=5")
    fit(dataset, parts, *overrides, "trainer.max_steps=10", "ckpt=last")
    assert rows(parts) == rows(straight)
    values = [float(value) for value in losses(straight)]
    assert statistics.mean(values[-3:]) < statistics.mean(values[:2])
    observation = {"images": {"front": np.zeros((32, 32, 3), np.uint8)}, "state": np.zeros(2), "seed": 0}
    one, other = (
        Policy.from_checkpoint(folder / "checkpoints/last.ckpt", device="cpu").infer(
            observation | {"prompt": "reach the red cube"}
        )
        for folder in (straight, parts)
    )
    np.testing.assert_array_equal(one["actions"], other["actions"])


@pytest.mark.slow
def test_one_command_sweeps_all_families(dataset, tmp_path):
    sweep = train("-m", "vlm=glob(*_tiny)", *PI0, f"data.root={dataset}", "trainer.max_steps=1", cwd=tmp_path)
    assert sweep.returncode == 0, sweep.stderr
    runs = sorted(tmp_path.glob("outputs/multirun/*/*/*/config.yaml"))
    assert len(runs) == len(FAMILIES)
