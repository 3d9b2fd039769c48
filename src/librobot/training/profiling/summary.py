"""The page of a profile: phases of a step, advice that follows from their shares, operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from librobot.training import pages

PHASES = ("data wait", "transfer", "forward", "backward", "optimiser", "other")
MUCH = {"data wait": 0.1, "transfer": 0.1, "optimiser": 0.2, "other": 0.1}
"""The share from which on a phase is worth something to be done about."""
COPIES = ("aten::copy_", "aten::_to_copy", "aten::contiguous", "aten::clone")


@dataclass(frozen=True)
class Operator:
    """Calls, milliseconds of its own over all traced steps, and share of all operators' time."""

    name: str
    calls: int
    milliseconds: float
    share: float


@dataclass(frozen=True)
class Summary:
    """`steps` were timed, with `samples` in all; `seconds` of each phase over them. `data wait` is until the
    next batch was there, `transfer` until it was on the device, augmented; `other` are callbacks."""

    device: str
    steps: int
    samples: int
    seconds: Mapping[str, float]
    operators: Sequence[Operator]
    precision: str
    workers: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def shares(self) -> dict[str, float]:
        return {name: seconds / (self.total or 1.0) for name, seconds in self.seconds.items()}


def advice(summary: Summary) -> list[str]:
    """What the step waits for, in words, the largest wait first, and which options change it."""
    if not summary.steps:
        return ["no step was timed: the run was shorter than callbacks.profile.skip; raise trainer.max_steps"]
    shares = summary.shares
    longest = max(shares, key=lambda name: shares[name])
    said = [f"The step spends most of its time in: {longest} ({shares[longest]:.0%})."]
    more = max(2, 2 * summary.workers)
    remedies = {
        "data wait": f"The step waits {shares['data wait']:.0%} of its time for data: "
        f"data.num_workers={more}, data.cache=memmap, or a smaller data.image_size.",
        "transfer": f"Moving and augmenting batches takes {shares['transfer']:.0%}: a smaller "
        "data.image_size, fewer cameras (data.cameras), or data.augmentation=null.",
        "optimiser": f"The optimiser takes {shares['optimiser']:.0%}: trainer.accumulate_grad_batches=4 "
        "steps less often, frozen parts (framework.freeze) need none, optim.fused=true is the fast kernel.",
        "other": f"Callbacks and logging take {shares['other']:.0%}: raise trainer.log_every_n_steps, or "
        "leave callbacks out (callbacks=progress shows what they cost).",
    }
    large = [name for name, least in MUCH.items() if shares.get(name, 0.0) >= least]
    said += [remedies[name] for name in sorted(large, key=lambda name: -shares[name])]
    if not large:
        said.append("It computes almost all of the time: only a faster device, or less to compute, helps.")
        if summary.precision.startswith("32") and summary.device != "CPU":
            said.append("It computes in 32 bits: trainer.precision=bf16-mixed is faster on a GPU.")
    copies = sum(operator.share for operator in summary.operators if operator.name in COPIES)
    if copies > 0.15:
        said.append(
            f"Copies and conversions are {copies:.0%} of the operators' time; trace.json shows whose."
        )
    return said


def write_summary(path: Path, summary: Summary) -> Path:
    """The page, in one file that needs no other."""
    steps = max(1, summary.steps)
    phases = [(name, 1000 * summary.seconds[name] / steps, summary.shares[name]) for name in PHASES]
    text = pages.render(
        "profiling/summary.html",
        title="What a training step waits for",
        summary=summary,
        phases=phases,
        step=1000 * summary.total / steps,
        speed=summary.samples / summary.total if summary.total else 0.0,
        advice=advice(summary),
    )
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path
