"""librobot-bench vlm: what librobot adds to a transformers model, and what caching the prefix saves.

Two comparisons for each backbone, both sides in turns in this one process, medians:

    prefix    the backbone's `forward` beside a direct call of the transformers model: the same pictures,
              prepared by the same picture processor, the same token ids, keys and values collected
    sampling  pi0 drawing actions with the prefix computed once, beside pi0 computing it at every step
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from librobot.bench._rows import Row, print_rows, write_rows
from librobot.bench._timing import in_turns
from librobot.bench.step import PROMPTS, SPEC, make_framework
from librobot.config.compose import compose
from librobot.errors import LibrobotError
from librobot.types import Observation
from librobot.vlms.pretrained import PretrainedVLM

GOAL = 1.05
OUTPUT = Path("outputs/bench/vlm.json")


def main(options: Sequence[str]) -> list[Row]:
    """Measure, print a table, write the JSON; returns the rows."""
    arguments = parser().parse_args(list(options))
    rows: list[Row] = []
    for name in track(arguments.vlm, description="backbones"):
        rows += measure(name, arguments)
        write_rows(arguments.output, rows)
    print_rows("backbones", rows, arguments.output)
    return rows


def tiny_families() -> list[str]:
    """The `vlm=` options that stand for a published family at a small size."""
    names = [file.name for file in (files("librobot.conf") / "vlm").iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith("_tiny.yaml"))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("librobot-bench vlm", description=__doc__.partition("\n")[0])
    made.add_argument("--vlm", nargs="+", default=tiny_families(), help="options of the vlm group")
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--rounds", type=int, default=20, help="calls of each side, in turns")
    made.add_argument("--warmup", type=int, default=3, help="calls before them")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    made.add_argument(
        "overrides", nargs="*", help="of the configuration, as for librobot-train: vlm.compile=true"
    )
    made.add_argument("--output", type=Path, default=OUTPUT)
    return made


@torch.inference_mode()
def measure(name: str, arguments: argparse.Namespace) -> list[Row]:
    """Milliseconds of one backbone: the prefix, then sampling."""
    cfg = configuration(name, arguments.overrides)
    framework = make_framework(cfg).eval().to(arguments.device, getattr(torch, arguments.dtype))
    vlm: Any = framework.vlm
    if not isinstance(vlm, PretrainedVLM):
        raise LibrobotError(f"librobot-bench vlm: vlm={name} is no published family; choose another --vlm")
    observation = framework.prepare(observe(arguments.batch_size).to(arguments.device))
    turns: dict[str, Any] = {name: getattr(arguments, name) for name in ("rounds", "warmup", "device")}
    rows = []
    if vlm.has_cache:
        ours, bare = in_turns(lambda: vlm(observation), lambda: direct(vlm, observation), **turns)
        rows.append(Row(f"{name}, prefix", ours, bare, "the transformers model", "ms", GOAL))
    steps = cfg.head.num_steps
    ours, again = in_turns(
        lambda: framework.sample_actions(observation),
        lambda: recomputing(framework, observation, steps),
        **turns,
    )
    rows.append(Row(f"{name}, {steps} steps of pi0", ours, again, "the prefix at every step", "ms", 1.0))
    return rows


def configuration(name: str, overrides: Sequence[str]) -> DictConfig:
    cfg = compose(
        ["framework=pi0", f"vlm={name}", "framework.horizon=10", "vlm.pretrained=false", *overrides]
    )
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    parts = ("framework", "vlm", "adapter", "head", "optim", "scheduler", "seed")
    return OmegaConf.create({part: plain[part] for part in parts})


def direct(vlm: PretrainedVLM, observation: Observation) -> Any:
    """What one writes without librobot: prepare the pictures, call the model."""
    inputs = observation.inputs
    assert inputs is not None
    pictures = [p[0] for row in zip(*observation.images.values(), strict=True) for p in row]
    prepared = vlm.picture_inputs(pictures, observation.batch_size)
    dtype = vlm.model.dtype
    return vlm.model.model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"].long(),
        use_cache=True,
        **vlm.text_inputs(inputs),
        **{name: v.to(dtype) if v.is_floating_point() else v for name, v in prepared.items()},
    )


def recomputing(framework: Any, observation: Observation, steps: int) -> torch.Tensor:
    """pi0's sampling with a new prefix for every denoising step."""
    shape = (observation.batch_size, framework.horizon, framework.action_width)

    def denoise(x_t: torch.Tensor, time: torch.Tensor, context: Any) -> torch.Tensor:
        return framework.denoise(x_t, time, framework.condition(observation))

    return framework.head.sample(denoise, None, shape, noise=None, num_steps=steps)


def observe(size: int) -> Observation:
    """Random pictures of the bench's robot, at a common camera's size."""
    draw = torch.Generator().manual_seed(0)
    images = {
        camera: torch.randint(0, 256, (size, 1, 3, 240, 320), dtype=torch.uint8, generator=draw)
        for camera in SPEC.camera_names
    }
    return Observation(
        images=images,
        image_mask={camera: torch.ones(size, dtype=torch.bool) for camera in images},
        state=torch.randn(size, 1, SPEC.state_dim, generator=draw),
        prompt=[PROMPTS[i % len(PROMPTS)] for i in range(size)],
    )
