"""librobot-bench frameworks: training step and sampling beside lerobot's implementation of the same model.

Both sides have the same weights (through the import table), the same batch, already normalised and tokenised,
and the same threads, in turns in this one process; medians. Before anything is timed, the two losses must
agree. A training step is the loss, its gradients and one step of the same AdamW.

What sampling pi0 can gain depends on the prefix, which both sides compute once. The published model (three
pictures of 256 tokens, 50 actions, 10 steps) spends 91% of its multiplications there, and 46 of 73 ms on an
RTX 4090 (Black et al. 2024, table I). `pi0` and `pi05` here have two pictures, an MLP of 4 instead of 8 times
the language model's width and heads of 32 instead of 256 dimensions: 72%. `pi0_as_published` has an eighth of
all widths and a third of the layers: 85%.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from librobot.bench._lerobot import BATCHES, PEERS, Peer, peer_of
from librobot.bench._lerobot_fast import chunks
from librobot.bench._rows import Row, print_rows, write_rows
from librobot.bench._timing import in_turns
from librobot.bench.step import make_batches, unit_statistics
from librobot.config.build import build_framework
from librobot.config.compose import compose, resolve
from librobot.errors import LibrobotError
from librobot.frameworks.base import Framework
from librobot.types import Batch, Camera, Dim, RobotSpec

OUTPUT = Path("outputs/bench/frameworks.json")
SEED = 1
SAMPLING_GOALS = {"pi0": 0.5, "pi0_as_published": 0.5}
AGREEMENT = 1e-4  # of the losses, relative
SPEC = RobotSpec(
    name="bench",
    cameras=tuple(Camera(name, 224, 224) for name in ("front", "wrist")),
    state=tuple(Dim(f"s{i}") for i in range(14)),
    action=tuple(Dim(f"a{i}") for i in range(14)),
    control_hz=50.0,
)
THREE_CAMERAS = replace(
    SPEC, cameras=tuple(Camera(name, 224, 224) for name in ("front", "left_wrist", "right_wrist"))
)
SPECS = {"pi0_as_published": THREE_CAMERAS}
PALIGEMMA = ["vlm=paligemma", "vlm.pretrained=false"]
SMALL_PALIGEMMA = [
    *PALIGEMMA,
    "vlm.config.projection_dim=256", "vlm.config.hidden_size=256",
    "vlm.config.vision_config.hidden_size=144", "vlm.config.vision_config.intermediate_size=384",
    "vlm.config.vision_config.num_hidden_layers=4", "vlm.config.vision_config.num_attention_heads=2",
    "vlm.config.text_config.vocab_size=320", "vlm.config.text_config.hidden_size=256",
    "vlm.config.text_config.intermediate_size=1024", "vlm.config.text_config.num_hidden_layers=6",
    "vlm.config.text_config.num_attention_heads=8", "vlm.config.text_config.head_dim=32",
]  # fmt: skip
EIGHTH_PALIGEMMA = [
    *SMALL_PALIGEMMA,
    "vlm.config.text_config.intermediate_size=2048", "vlm.config.vision_config.intermediate_size=538",
    "vlm.config.vision_config.num_hidden_layers=9",
]  # fmt: skip
SMALL_SMOLVLM = [  # a quarter of the widths, half of the layers that SmolVLA keeps, the same tokens
    "vlm=smolvla", "vlm.pretrained=false", "vlm.checkpoint=null", "vlm.num_layers=8",
    "vlm.config.vision_config.hidden_size=192", "vlm.config.vision_config.intermediate_size=768",
    "vlm.config.vision_config.num_hidden_layers=6", "vlm.config.vision_config.num_attention_heads=3",
    "vlm.config.text_config.vocab_size=320", "vlm.config.text_config.hidden_size=240",
    "vlm.config.text_config.intermediate_size=640", "vlm.config.text_config.num_hidden_layers=16",
]  # fmt: skip
SMALL_QWEN = [  # a quarter of the widths and of the layers; a picture has 49 tokens
    "vlm=cosmos_reason2", "vlm.pretrained=false", "vlm.checkpoint=null", "vlm.num_layers=4",
    "vlm.config.vision_config.depth=6", "vlm.config.vision_config.hidden_size=256",
    "vlm.config.vision_config.intermediate_size=1024", "vlm.config.vision_config.num_heads=4",
    "vlm.config.vision_config.out_hidden_size=512",
    "vlm.config.vision_config.deepstack_visual_indexes=[1,2,4]",
    "vlm.config.text_config.vocab_size=320", "vlm.config.text_config.hidden_size=512",
    "vlm.config.text_config.intermediate_size=1536", "vlm.config.text_config.num_hidden_layers=4",
    "vlm.config.text_config.num_attention_heads=4", "vlm.config.text_config.num_key_value_heads=2",
    "framework.width=384", "framework.mlp_width=256", "framework.num_dit_layers=8", "framework.num_heads=8",
    "framework.num_fusion_layers=1", "framework.num_fusion_heads=8",
]  # fmt: skip
MODELS = {
    "act": ["framework=act", "framework.backbone=resnet18", "framework.dropout=0.0"],
    "diffusion_policy": [
        "framework=diffusion_policy", "framework.level_channels=[128,256,512]", "framework.crop=1.0",
        "head.num_steps=10", "head.spacing=leading",
    ],
    "pi0": ["framework=pi0"],
    "pi0_as_published": ["framework=pi0"],
    "pi05": ["framework=pi05"],
    "pi0_fast": [
        "framework=pi0_fast", "framework.start=begin", "framework.lowercase=false", "framework.skip_tokens=0",
    ],
    "smolvla": ["framework=smolvla"],
    "groot": [
        "framework=groot_n17", "framework.dropout=0.0", "framework.state_dropout=0.0",
        "framework.picture_size=null", "framework.picture_crop=1.0",
    ],
}  # fmt: skip
SIZES = {
    "pi0": SMALL_PALIGEMMA,
    "pi0_as_published": EIGHTH_PALIGEMMA,
    "pi05": SMALL_PALIGEMMA,
    "pi0_fast": SMALL_PALIGEMMA,
    "smolvla": SMALL_SMOLVLM,
    "groot": SMALL_QWEN,
}


def main(options: Sequence[str]) -> list[Row]:
    """Measure, print a table, write the JSON; returns the rows."""
    arguments = parser().parse_args(list(options))
    rows: list[Row] = []
    for name in track(arguments.framework, description="frameworks"):
        rows += measure(name, arguments)
        write_rows(arguments.output, rows)
    print_rows("frameworks", rows, arguments.output)
    return rows


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("librobot-bench frameworks", description=__doc__.partition("\n")[0])
    made.add_argument("--framework", nargs="+", default=list(PEERS), choices=list(PEERS))
    made.add_argument("--batch-size", type=int, default=4, help="of a training step")
    made.add_argument("--rounds", type=int, default=10, help="calls of each side, in turns")
    made.add_argument("--warmup", type=int, default=2, help="calls before them")
    made.add_argument("--full", action="store_true", help="pi0's published size (a GPU's), not a small one")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    made.add_argument("overrides", nargs="*", help="of the configuration, as for librobot-train")
    made.add_argument("--output", type=Path, default=OUTPUT)
    return made


def measure(name: str, arguments: argparse.Namespace) -> list[Row]:
    """Milliseconds of a training step, then of one chunk for one observation."""
    turns: dict[str, Any] = {key: getattr(arguments, key) for key in ("rounds", "warmup", "device")}
    dtype = getattr(torch, arguments.dtype)
    ours = framework(name, arguments).to(arguments.device)
    data = batch(ours, arguments.batch_size).to(arguments.device)
    peer = peer_of(name, ours, data)
    noise, time = drawn(name, ours, data)
    if dtype == torch.float32:
        check_agreement(name, ours, peer, data, noise, time)
    ours.to(dtype)
    peer.to(dtype)
    noise = noise.to(dtype)
    steps = in_turns(
        training_step(ours, lambda: ours.compute_loss(data, noise=noise, time=time)[0]),
        training_step(peer.policy, lambda: peer.loss(noise, time)),
        **turns,
    )
    ours.eval()
    peer.policy.eval()
    one = batch(ours, 1).to(arguments.device)
    peer.batch = BATCHES[name](ours, one)
    peer.to(dtype)
    alone = noise[:1]
    with torch.inference_mode():
        chunks = in_turns(
            lambda: ours.sample_actions(one.observation, noise=alone), lambda: peer.sample(alone), **turns
        )
    title = f"{name} ({sum(parameter.numel() for parameter in ours.parameters()) / 1e6:.0f} M)"
    return [
        Row(f"{title}, training step of {arguments.batch_size}", *steps, "lerobot", "ms", 1.0),
        Row(f"{title}, sampling a chunk", *chunks, "lerobot", "ms", SAMPLING_GOALS.get(name, 1.0)),
    ]


def training_step(module: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """The loss, its gradients, and a step so small that both sides keep their weights."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-12)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def check_agreement(name: str, ours: Framework, peer: Peer, data: Batch, noise: Tensor, time: Tensor) -> None:
    """Raises LibrobotError where the two would not do the same work."""
    torch.manual_seed(SEED)
    expected = peer.loss(noise, time).item()
    torch.manual_seed(SEED)
    found = ours.compute_loss(data, noise=noise, time=time)[0].item()
    if abs(found - expected) > AGREEMENT * abs(expected):
        raise LibrobotError(
            f"librobot-bench frameworks: {name}'s loss is {found:.6g} and lerobot's {expected:.6g} with the "
            f"same weights and inputs; what is timed would not be the same computation"
        )


def framework(name: str, arguments: argparse.Namespace) -> Framework:
    """Random weights, unit statistics."""
    backbone = PALIGEMMA if arguments.full and name.startswith("pi") else SIZES.get(name, [])
    cfg = compose([*MODELS[name], *backbone, *arguments.overrides])
    torch.manual_seed(0)
    spec = SPECS.get(name, SPEC)
    made = build_framework(cfg, spec)
    made.normalizer.fit(unit_statistics(spec))
    if made.head.needs_fit:  # action tokens
        made.head.fit(made.normalized_chunks(chunks(256, made.horizon, spec.action_dim)))
    made.attach_run(config=resolve(cfg), provenance={})
    return made.train()


def batch(ours: Framework, size: int) -> Batch:
    data = make_batches(size, ours.horizon, 1, spec=ours.spec, obs_steps=ours.obs_steps)[0]
    if "decoder" in ours.brings:  # one answer for all, and of the length that a motion's has
        motion = chunks(1, ours.horizon, ours.spec.action_dim)
        data = replace(data, actions=motion.expand(size, -1, -1).contiguous())
    return replace(data, observation=ours.prepare(data.observation))


def drawn(name: str, ours: Framework, data: Batch) -> tuple[Tensor, Tensor]:
    """Noise and times for the two losses: what lerobot's Diffusion Policy draws by itself after `SEED`."""
    torch.manual_seed(SEED)
    device = data.actions.device
    noise = torch.randn(data.batch_size, ours.horizon, ours.action_width, device=device)
    levels = getattr(ours.head, "num_train_steps", 1000)
    level = torch.randint(0, levels, (data.batch_size,), device=device)
    # GR00T rounds times down to whole steps: in the middle of one both sides round alike.
    return noise, (level + (0.5 if name == "groot" else 1.0)) / levels
