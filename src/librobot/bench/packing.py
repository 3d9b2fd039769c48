"""librobot-bench packing: a training step over packed rows beside one over padded rows.

pi0-FAST with small backbones, on random batches whose prompts have three lengths and whose chunks range from
smooth to jerky, so that their FAST tokens are few to many. Three rows for each backbone: tokens that the
language model computes, and the time of a step (loss and gradients) beside padded rows in random order and
beside padded rows of like length (`data.bucket`). Both sides have the same weights and samples, in turns in
this one process, medians; on a CPU the time is the process's own.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from rich.progress import track

from librobot.bench._rows import Row, print_rows, write_rows
from librobot.bench._timing import clock, in_turns, process_clock
from librobot.bench.step import SPEC, make_batches, make_framework
from librobot.config.compose import compose
from librobot.data.buckets import LengthBuckets
from librobot.frameworks.base import Framework
from librobot.types import Batch

OUTPUT = Path("outputs/bench/packing.json")
HORIZON = 16
PROMPTS = (
    "open the drawer",
    "put the blue cube on the green disc",
    "take the red cup from the shelf, put it down beside the plate and come back",
)
MODELS = {
    "tiny": ["vlm=tiny", "vlm.hidden_size=256", "vlm.num_layers=4", "vlm.mlp_width=1024",
             "vlm.max_prompt_tokens=200"],
    "qwen2vl": ["vlm=qwen2vl_tiny", "vlm.max_prompt_tokens=200", "vlm.config.text_config.hidden_size=256",
                "vlm.config.text_config.intermediate_size=1024", "vlm.config.text_config.num_hidden_layers=4",
                "vlm.config.vision_config.hidden_size=256",
                "vlm.config.text_config.rope_parameters.mrope_section=[8,12,12]"],
}  # fmt: skip


def main(options: Sequence[str]) -> list[Row]:
    """Measure, print a table, write the JSON; returns the rows."""
    arguments = parser().parse_args(list(options))
    rows: list[Row] = []
    for name in track(arguments.model, description="backbones"):
        rows += measure(name, arguments)
        write_rows(arguments.output, rows)
    print_rows("packing", rows, arguments.output)
    return rows


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("librobot-bench packing", description=__doc__.partition("\n")[0])
    made.add_argument("--model", nargs="+", default=list(MODELS), choices=tuple(MODELS))
    made.add_argument("--batch-size", type=int, default=32)
    made.add_argument("--batches", type=int, default=4, help="different ones, which are also the buckets")
    made.add_argument("--rounds", type=int, default=12, help="steps of each side, in turns")
    made.add_argument("--warmup", type=int, default=2, help="steps before them")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("overrides", nargs="*", help="of the configuration: vlm.num_layers=8")
    made.add_argument("--output", type=Path, default=OUTPUT)
    return made


def measure(name: str, arguments: argparse.Namespace) -> list[Row]:
    padded, packed = (build(name, pack, arguments) for pack in (False, True))
    batches = make_samples(arguments.batch_size, arguments.batches, arguments.device)
    alike = bucketed(padded, batches, arguments.batch_size)
    turns: dict[str, Any] = {"rounds": arguments.rounds, "warmup": arguments.warmup}
    turns |= {"device": arguments.device, "read": clock if "cuda" in arguments.device else process_clock}
    title = f"{name}, batch of {arguments.batch_size}"
    of_packed, of_padded, of_alike = (
        sum(tokens_computed(framework, batch) for batch in given)
        for framework, given in ((packed, batches), (padded, batches), (padded, alike))
    )
    rows = [
        Row(f"{title}, tokens", of_packed, of_padded, "padded rows", "tokens"),
        Row(f"{title}, tokens", of_packed, of_alike, "padded rows of like length", "tokens"),
    ]
    for given, peer in ((batches, "padded rows"), (alike, "padded rows of like length")):
        ours, theirs = in_turns(steps(packed, batches), steps(padded, given), **turns)
        rows.append(Row(f"{title}, step", ours, theirs, peer, "ms"))
    return rows


def build(name: str, pack: bool, arguments: argparse.Namespace) -> Framework:
    options = ["framework=pi0_fast", f"framework.horizon={HORIZON}", f"framework.pack={str(pack).lower()}"]
    cfg = compose([*options, *MODELS[name], *arguments.overrides])
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    parts = ("framework", "vlm", "adapter", "head", "optim", "scheduler", "seed")
    framework = make_framework(OmegaConf.create({part: plain[part] for part in parts}))
    chunks = [batch.actions for batch in make_samples(64, 4, "cpu")]
    framework.head.fit(torch.cat(chunks))
    return framework.train().to(arguments.device)


def make_samples(size: int, count: int, device: str) -> list[Batch]:
    """Chunks that are sums of few to many waves, and prompts of three lengths."""
    random = torch.Generator().manual_seed(1)
    made = []
    for batch in make_batches(size, HORIZON, count):
        time = torch.linspace(0, 1, HORIZON)[None, :, None, None]
        shape = (size, 1, SPEC.action_dim, 8)
        phase = torch.rand(shape, generator=random)
        roughness = 1 + torch.arange(8) * torch.rand(size, 1, 1, 1, generator=random)
        waves = (2 * torch.pi * (roughness * time + phase)).sin() / (1 + torch.arange(8))
        prompts = [PROMPTS[int(i)] for i in torch.randint(3, (size,), generator=random)]
        observation = replace(batch.observation, prompt=prompts)
        actions = (waves.sum(dim=-1) / 2).clamp(-1, 1)
        made.append(replace(batch, observation=observation, actions=actions).to(device))
    return made


def bucketed(framework: Any, batches: list[Batch], size: int) -> list[Batch]:
    """The same samples in batches of like length."""
    observations = [batch.observation for batch in batches]
    state = torch.cat([observation.state for observation in observations])
    actions = torch.cat([batch.actions for batch in batches])
    prompts = [prompt for observation in observations for prompt in observation.prompt]
    lengths = framework.token_lengths(prompts, state, actions)
    everything = np.arange(len(prompts))
    order = LengthBuckets(lambda _: everything, lengths, batch=size, window=len(batches), seed=0).indices(0)
    images = {
        name: torch.cat([observation.images[name] for observation in observations])
        for name in observations[0].images
    }
    made = []
    for part in order.reshape(-1, size):
        observation = replace(
            observations[0],
            images={name: image[part] for name, image in images.items()},
            state=state[part],
            prompt=[prompts[i] for i in part],
        )
        made.append(replace(batches[0], observation=observation, actions=actions[part]))
    return made


def steps(framework: Framework, batches: list[Batch]) -> Callable[[], None]:
    """A training step over the next of `batches`."""
    following: Iterator[Batch] = itertools.cycle(batches)

    def step() -> None:
        loss, _ = framework.compute_loss(next(following))
        loss.backward()
        framework.zero_grad()

    return step


@torch.no_grad()
def tokens_computed(framework: Framework, batch: Batch) -> int:
    """Tokens that pass the language model's first block."""
    assert framework.vlm is not None
    counted: list[int] = []

    def count(block: Any, given: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        counted.append(hidden.shape[0] * hidden.shape[1])

    watch = framework.vlm.blocks[0].register_forward_hook(count)
    framework.compute_loss(batch)
    watch.remove()
    return sum(counted)
