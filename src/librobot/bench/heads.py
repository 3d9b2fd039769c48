"""librobot-bench heads: what each action head costs, and what distillation into one step saves.

Every head runs on one size of network (`network=dit` for those that need a denoiser, `causal` for those that
predict tokens) over the same random context, beside head=l1, in turns in this one process, medians:

    sample    drawing a batch of chunks
    train     the loss and its gradients

Then a flow head is trained on smooth chunks that swerve left or right, and distilled (head=consistency):

    time      one step of the consistency head beside ten of its teacher
    error     how far their chunks are from the teacher's with 100 steps, from the same noise
              (head.fresh_noise=false); also of the teacher with as few steps as the student
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.progress import track
from torch import Tensor

from librobot.bench._rows import Row, print_rows, write_rows
from librobot.bench._timing import in_turns
from librobot.config.build import build
from librobot.heads.base import ActionHead
from librobot.networks.base import OPTION_OF, ContextTokens, Network, Sizes

OUTPUT = Path("outputs/bench/heads.json")
LEARNERS = ("consistency", "reflow")  # need a trained teacher


def main(options: Sequence[str]) -> list[Row]:
    """Measure, print a table, write the JSON; returns the rows."""
    arguments = parser().parse_args(list(options))
    turns: dict[str, Any] = {"rounds": arguments.rounds, "warmup": 2}
    reference = Measured("l1", arguments)
    rows: list[Row] = []
    for name in track(arguments.head, description="heads"):
        measured = Measured(name, arguments)
        for what in ("sample", "train"):
            ours, peer = in_turns(getattr(measured, what), getattr(reference, what), **turns)
            rows.append(Row(f"{name}, {what}", ours, peer, f"l1, {what}", "ms"))
        write_rows(arguments.output, rows)
    if arguments.distil_steps:
        rows += distilled(arguments, turns)
    write_rows(arguments.output, rows)
    print_rows("action heads", rows, arguments.output)
    return rows


def options() -> list[str]:
    """The `head=` options that stand on their own."""
    names = [file.name for file in (files("librobot.conf") / "head").iterdir()]
    return sorted(n.removesuffix(".yaml") for n in names if n.endswith(".yaml") and n[:-5] not in LEARNERS)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("librobot-bench heads", description=__doc__.partition("\n")[0])
    made.add_argument("--head", nargs="+", default=options(), help="options of the head group")
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--horizon", type=int, default=16)
    made.add_argument("--action-dim", type=int, default=7)
    made.add_argument("--width", type=int, default=128, help="of the networks")
    made.add_argument("--context-tokens", type=int, default=64)
    made.add_argument("--rounds", type=int, default=10, help="calls of each side, in turns")
    made.add_argument(
        "--distil-steps", type=int, default=1500, help="of the teacher and of the student; 0: none"
    )
    made.add_argument("--output", type=Path, default=OUTPUT)
    return made


class Measured:
    """A head with its network, over random context and actions."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.shape = (arguments.batch_size, arguments.horizon, arguments.action_dim)
        self.head: ActionHead = build(option("head", name), f"head={name}")
        self.head.attach(horizon=arguments.horizon, action_dim=arguments.action_dim)
        if self.head.needs_fit:
            self.head.fit(swerves(torch.arange(2000) % 2, *self.shape[1:])[0])
        self.network = network(self.head, arguments, OPTION_OF[self.head.network])
        count, width = arguments.context_tokens, arguments.width
        self.context = ContextTokens(
            values=torch.randn(arguments.batch_size, count, width),
            mask=torch.ones(arguments.batch_size, count, dtype=torch.bool),
            features=torch.randn(arguments.batch_size, 4),
            null=torch.zeros(width),
        )
        self.actions = torch.rand(self.shape) * 2 - 1
        self.mask = torch.ones(self.shape[:2], dtype=torch.bool)

    @torch.no_grad()
    def sample(self) -> None:
        self.head.eval()
        self.network.eval()
        self.head.sample(self.network, self.context, self.shape)

    def train(self) -> None:
        self.head.train()
        self.network.train()
        self.network.zero_grad()
        self.head.loss(self.network, self.context, self.actions, self.mask).mean().backward()


def option(group: str, name: str) -> Any:
    """An option of a group, with what it inherits left out: heads and networks inherit nothing."""
    return OmegaConf.create((files("librobot.conf") / group / f"{name}.yaml").read_text())


def network(head: ActionHead, arguments: argparse.Namespace, name: str) -> Network:
    node = option("network", name)
    for part in [node] if name != "pair" else [node.denoiser, node.decoder]:
        part.width = arguments.width
    return build(node, f"network={name}")(sizes=Sizes.of(head, arguments.width))


def swerves(which: Tensor, horizon: int, action_dim: int) -> tuple[Tensor, ContextTokens]:
    """Chunks (n, k, a) that swerve to either side with a width that depends on the context."""
    step = torch.linspace(0, torch.pi, horizon)
    side = 2.0 * (torch.rand(len(which)) < 0.5) - 1.0
    height = side * (0.4 + 0.4 * which)
    phase = 0.2 * torch.arange(action_dim)
    chunks = height[:, None, None] * torch.sin(step[:, None] + phase) + 0.03 * torch.randn(
        len(which), horizon, action_dim
    )
    return chunks, situations(which)


def situations(which: Tensor) -> ContextTokens:
    """One token for each sample that names its situation."""
    values = torch.nn.functional.one_hot(which, 128).float()[:, None]
    return ContextTokens(
        values=values,
        mask=torch.ones(len(which), 1, dtype=torch.bool),
        features=values[:, 0],
        null=torch.zeros(128),
    )


def distilled(arguments: argparse.Namespace, turns: dict[str, Any]) -> list[Row]:
    """Train a flow head, distil it, and hold one step against ten."""
    torch.manual_seed(0)
    small = argparse.Namespace(**vars(arguments) | {"width": 128})
    shape = (64, arguments.horizon, arguments.action_dim)
    made = {}
    for name in ("flow_matching", "consistency"):
        head = build(option("head", name), f"head={name}")
        head.attach(horizon=arguments.horizon, action_dim=arguments.action_dim)
        made[name] = (head, network(head, small, "mlp"))
    teacher, teacher_network = made["flow_matching"]
    fit(teacher, teacher_network, arguments.distil_steps, "teacher")
    teacher_network.requires_grad_(False).eval()
    student, student_network = made["consistency"]
    student_network.load_state_dict(teacher_network.state_dict())
    student.teach(teacher, teacher_network)
    student.fresh_noise = False  # else its further steps draw other chunks than the teacher's
    fit(student, student_network, arguments.distil_steps, "student")

    context, noise = situations(torch.arange(64) % 2), torch.randn(shape)

    def draw(head: Any, denoiser: Network, num_steps: int) -> Callable[[], Tensor]:
        return torch.no_grad()(
            lambda: head.sample(denoiser.eval(), context, shape, noise=noise, num_steps=num_steps)
        )

    one, ten = draw(student, student_network, 1), draw(teacher, teacher_network, 10)
    ours, peer = in_turns(one, ten, **turns)
    exact = draw(teacher, teacher_network, 100)()

    def error(chunks: Tensor) -> float:
        return (chunks - exact).abs().mean().item()

    rows = [
        Row("consistency, 1 step, time", ours, peer, "its teacher, 10 steps", "ms"),
        Row("consistency, 1 step, error", error(one()), error(ten()), "its teacher, 10 steps", "normalised"),
    ]
    for count in (1, 2, 4):
        steps = "1 step" if count == 1 else f"{count} steps"
        own = error(draw(student, student_network, count)())
        crude = error(draw(teacher, teacher_network, count)())
        rows.append(Row(f"consistency, {steps}, error", own, crude, f"its teacher, {steps}", "normalised"))
    return rows


def fit(head: ActionHead, denoiser: Network, num_steps: int, name: str) -> None:
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    mask = torch.ones(256, head.horizon, dtype=torch.bool)
    for _ in track(range(num_steps), description=name):
        actions, context = swerves(torch.randint(2, (256,)), head.horizon, head.action_dim)
        optimizer.zero_grad()
        head.loss(denoiser, context, actions, mask).mean().backward()
        optimizer.step()
        schedule.step()
