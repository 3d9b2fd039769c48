"""librobot-bench step: what Hydra, Lightning and the default callbacks add to a bare PyTorch loop.

Both sides train the same model, built from the same configuration and seed, on the same batches, in this one
process, in turns (A B A B ...). A round's step time is the mean over its steps after a warm-up, so that what
happens every few steps (logging, progress) counts; the result is the median over the rounds.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from librobot.bench._rows import Row, print_rows, write_rows
from librobot.config.build import build, build_framework, build_trainer
from librobot.config.compose import compose
from librobot.frameworks.base import Framework
from librobot.types import Batch, Camera, Dim, Observation, RobotSpec

GOAL = 1.05
OUTPUT = Path("outputs/bench/step.json")
FRAMEWORKS = ("act", "pi0")
HORIZON = 10
# A policy of the size that trains on a CPU in minutes.
SMALL = [f"framework.horizon={HORIZON}", "vlm=tiny", "vlm.hidden_size=64", "vlm.mlp_width=128"]
MODELS = {
    "act": [
        "framework=act",
        *SMALL,
        "framework.width=96",
        "framework.num_heads=4",
        "framework.feedforward_width=256",
        "framework.num_encoder_layers=1",
        "framework.num_decoder_layers=2",
        "framework.num_vae_layers=1",
    ],
    "pi0": ["framework=pi0", *SMALL],
}
SPEC = RobotSpec(
    name="bench",
    cameras=(Camera("front", 64, 64), Camera("wrist", 64, 64)),
    state=tuple(Dim(f"s{i}") for i in range(10)),
    action=tuple(Dim(f"a{i}") for i in range(5)),
    control_hz=10.0,
)
PROMPTS = ("reach the red cube", "open the drawer", "put the blue cube on the green disc")


class StepTimer(Callback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ends.append(time.perf_counter())


def main(options: Sequence[str]) -> list[Row]:
    """Measure, print a table, write the JSON; returns the rows."""
    arguments = parser().parse_args(list(options))
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    rows = []
    for name in arguments.framework:
        rows.append(measure(name, arguments))
        write_rows(arguments.output, rows)
    print_rows("step time", rows, arguments.output)
    return rows


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("librobot-bench step", description=__doc__.partition("\n")[0])
    made.add_argument("--framework", nargs="+", default=list(FRAMEWORKS), choices=FRAMEWORKS)
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument("--steps", type=int, default=40, help="measured steps in a round")
    made.add_argument("--warmup", type=int, default=5, help="steps before them")
    made.add_argument("--rounds", type=int, default=5, help="rounds of each side, in turns")
    made.add_argument("--output", type=Path, default=OUTPUT)
    made.add_argument(
        "overrides", nargs="*", help="of the configuration, as for librobot-train: vlm.num_layers=4"
    )
    return made


def measure(name: str, arguments: argparse.Namespace) -> Row:
    """Step times of one framework, in milliseconds."""
    steps = arguments.warmup + arguments.steps
    batches = make_batches(arguments.batch_size, horizon=HORIZON, count=8)
    ours, bare = [], []
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory(prefix="librobot-bench-") as folder:
            cfg = configuration(name, folder, steps, arguments.overrides)
            ours.append(lightning_round(cfg, batches, arguments.warmup))
        bare.append(bare_round(cfg, batches, steps, arguments.warmup))
        times = f"librobot {ours[-1]:.1f} ms, bare {bare[-1]:.1f} ms"
        print(f"{name} round {number + 1}/{arguments.rounds}: {times}", flush=True)
    return Row(
        f"{name}, batch of {arguments.batch_size}",
        statistics.median(ours),
        statistics.median(bare),
        "bare PyTorch loop",
        "ms",
        GOAL,
    )


def configuration(name: str, folder: str, steps: int, overrides: Sequence[str]) -> DictConfig:
    """The resolved training configuration: default callbacks and CSV logger, on this machine's CPU."""
    fixed = [
        "trainer=cpu",
        f"trainer.max_steps={steps}",
        "logger=csv",
        "callbacks=default",
        f"run_dir={folder}",
    ]
    cfg = compose([*MODELS[name], *fixed, *overrides])
    parts = (
        "framework",
        "vlm",
        "adapter",
        "head",
        "optim",
        "scheduler",
        "trainer",
        "callbacks",
        "logger",
        "run_dir",
        "seed",
    )
    plain = {part: OmegaConf.to_container(cfg, resolve=True)[part] for part in parts}  # type: ignore[index, call-overload]
    return OmegaConf.create(plain)


def make_framework(cfg: DictConfig) -> Framework:
    """The same model with the same weights at each call."""
    torch.manual_seed(cfg.seed)
    framework = build_framework(cfg, SPEC)
    framework.normalizer.fit(unit_statistics())
    framework.attach_run(config={}, provenance={})
    return framework


def lightning_round(cfg: DictConfig, batches: list[Batch], warmup: int) -> float:
    """Mean step time of librobot's own path, in milliseconds."""
    framework = make_framework(cfg)
    trainer = build_trainer(cfg)
    timer = StepTimer()
    trainer.callbacks.append(timer)  # type: ignore[attr-defined]
    trainer.fit(framework, train_dataloaders=loader(batches))
    return mean_step(timer.ends, warmup)


def bare_round(cfg: DictConfig, batches: list[Batch], steps: int, warmup: int) -> float:
    """Mean step time of a loop as one writes it without any library, in milliseconds."""
    framework = make_framework(cfg).train()
    parameters = [parameter for parameter in framework.parameters() if parameter.requires_grad]
    optimizer = build(cfg.optim, "optim")([{"params": parameters}])
    scheduler = build(cfg.scheduler, "scheduler")(optimizer, total_steps=steps)
    clip = cfg.trainer.gradient_clip_val
    ends: list[float] = []
    while True:
        for batch in loader(batches):
            loss, _ = framework.compute_loss(batch)
            optimizer.zero_grad()
            loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            scheduler.step()
            ends.append(time.perf_counter())
            if len(ends) == steps:
                return mean_step(ends, warmup)


def mean_step(ends: Sequence[float], warmup: int) -> float:
    """Milliseconds a step, from the end of the warm-up to the end of the last step."""
    return 1000 * (ends[-1] - ends[warmup - 1]) / (len(ends) - warmup)


def loader(batches: list[Batch]) -> DataLoader:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def make_batches(
    size: int, horizon: int, count: int, *, spec: RobotSpec = SPEC, obs_steps: int = 1
) -> list[Batch]:
    """Random batches of the bench's robot."""
    generator = torch.Generator().manual_seed(0)
    shapes = {camera.name: (size, obs_steps, 3, camera.height, camera.width) for camera in spec.cameras}

    def image(camera: str) -> torch.Tensor:
        return torch.randint(0, 256, shapes[camera], dtype=torch.uint8, generator=generator)

    return [
        Batch(
            observation=Observation(
                images={camera: image(camera) for camera in spec.camera_names},
                image_mask={camera: torch.ones(size, dtype=torch.bool) for camera in spec.camera_names},
                state=torch.randn(size, obs_steps, spec.state_dim, generator=generator),
                prompt=[PROMPTS[i % len(PROMPTS)] for i in range(size)],
            ),
            actions=torch.randn(size, horizon, spec.action_dim, generator=generator),
            action_mask=torch.ones(size, horizon, dtype=torch.bool),
        )
        for _ in range(count)
    ]


def unit_statistics(spec: RobotSpec = SPEC) -> dict[str, dict[str, np.ndarray]]:
    """Statistics under which normalisation changes nothing."""
    made = {}
    for key, dim in (("state", spec.state_dim), ("action", spec.action_dim)):
        zeros, ones = np.zeros(dim), np.ones(dim)
        made[key] = {"mean": zeros, "std": ones, "min": -ones, "max": ones, "q01": -ones, "q99": ones}
    return made
