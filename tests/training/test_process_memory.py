"""What an estimate says of a whole training process on the CPU, beside the kernel's count of a real one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf, open_dict
from rich.console import Console

from librobot.config.compose import compose, resolve, write
from librobot.training.estimates.estimate import estimate
from librobot.training.estimates.process import ProcessMemory
from librobot.training.estimates.report import print_estimate, warnings_of
from librobot.training.launch import place

RUN = ["data=lerobot", "trainer=cpu", "trainer.max_steps=4", "data.num_workers=0", "callbacks=progress"]
RUN += ["data.batch_size=8", "vlm=tiny", "name=measured"]
CASES = {
    "act": ["framework=act", "framework.width=128", "framework.num_heads=4"],
    "act_large": ["framework=act"],  # 290 MB of weights
    "pi0": ["framework=pi0"],
    "diffusion_policy": ["framework=diffusion_policy", "framework.resize=[96,96]"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_process_takes_what_was_estimated(name, dataset, tmp_path):
    cfg = compose([*RUN, *CASES[name], f"data.root={dataset}", f"run_dir={tmp_path / 'run'}"])
    with open_dict(cfg):
        place(cfg)
    found = estimate(OmegaConf.create(resolve(cfg)), process=True).process
    measured = peak_of_a_run(write(cfg, tmp_path / "run/config.yaml"))
    numbers = {key: round(value / 1e6, 1) for key, value in vars(found).items()}
    print(json.dumps({"case": name, "measured": measured / 1e6, "estimated": found.total / 1e6, **numbers}))
    assert found.total == pytest.approx(measured, rel=0.1)


def peak_of_a_run(config: Path) -> int:
    """Most resident bytes of the training process until its run is over, whose malloc gives freed tensors
    back. When it then exits, the destructors of CUDA's libraries read 100 MB of their files, which is no
    memory that training needs. (wait4's ru_maxrss would begin with what this process had when it started the
    other.)"""
    command = [sys.executable, "-u", "-m", "librobot.training.worker", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}
    peak = 0
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("run directory:"):
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = next(int(row.split()[1]) for row in status.splitlines() if row.startswith("VmHWM"))
    assert process.returncode == 0
    return peak * 1024


def test_the_report_says_what_the_process_has(monkeypatch):
    monkeypatch.setattr("librobot.training.estimates.process.runtime", lambda cfg: 800_000_000)
    cfg = compose(
        [
            *RUN,
            "framework=pi0",
            "robot=so100",
            "data.root=unread",
            "run_dir=unused",
            "data.num_workers=2",
            "data.prefetch_factor=3",
        ]
    )
    found = estimate(cfg, process=True)
    assert found.process == ProcessMemory(8e8, found.cost.peak, found.cost.batch, 6 * found.cost.batch, 2)
    console = Console(record=True, width=400)
    print_estimate(found, cfg, console)
    assert "runtime 0.8 (interpreter, libraries, threads: measured here) + tensors" in console.export_text()
    monkeypatch.setattr("librobot.training.estimates.estimate.host_memory", lambda: 0.81)
    assert found.devices[0].fits
    assert "does not fit: a step takes" in warnings_of(found, cfg)[0]
