"""librobot-train --estimate: memory and time of a configuration on devices, before anything is downloaded.

The policy is built without weights and takes two training steps on tensors without memory, in the run's
precision, with its batch, augmentation, activation checkpointing, optimiser and gradient accumulation; every
allocation is counted. What a strategy shares out over devices is subtracted by the table in `sharding`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig

from librobot.config.build import build
from librobot.config.check import check
from librobot.training.estimates.chips import CHIPS, Chip, host_memory
from librobot.training.estimates.process import ProcessMemory, process_memory
from librobot.training.estimates.sharding import Shares, shares_of
from librobot.training.estimates.step import StepCost, eight_bit_state, step_cost
from librobot.training.estimates.subject import make_batch, make_policy, offline, robot_of
from librobot.training.estimates.weightless import weightless

ASSUMED_MFU = 0.4
CONTEXT = 1e9
"""Bytes of a GPU that CUDA, its libraries and the allocator's leftovers take."""
GATHERED_BLOCKS = 2  # the one that computes, and the next
MASTER = 4  # bytes of a 32-bit copy


@dataclass(frozen=True)
class DeviceEstimate:
    """On each of `count` devices: bytes by kind, `peak` what counts, `host` in the machine's memory for each
    device, seconds of an optimiser step (None where the device's peak is not known)."""

    chip: Chip | None
    count: int
    shares: Shares
    weights: float
    gradients: float
    optimizer: float
    activations: float
    peak: float
    host: float
    seconds: float | None
    samples_per_second: float | None

    @property
    def memory(self) -> float:
        """GB that there are."""
        return host_memory() if self.chip is None else self.chip.memory

    @property
    def fits(self) -> bool:
        return self.peak / 1e9 <= self.memory


@dataclass(frozen=True)
class Estimate:
    """What a step costs on one device that holds everything, and on each kind of device asked for."""

    cost: StepCost
    batch_size: int
    precision: str
    mfu: float
    devices: tuple[DeviceEstimate, ...]
    notes: tuple[str, ...]
    process: ProcessMemory | None = None
    """The whole training process, where it was asked for and runs on a CPU."""


def estimate(
    cfg: DictConfig,
    devices: Sequence[tuple[Chip, int]] | None = None,
    mfu: float = ASSUMED_MFU,
    *,
    process: bool = False,
) -> Estimate:
    """The cost of a training configuration; `devices` None takes this machine's memory, with the number of
    devices that the trainer asks for, and gives no time. With `process` an empty training process is started
    and measured too, if the run would be on the CPU.

    Raises LibrobotError where the robot is not known without the dataset, or the configuration is wrong.
    """
    check(cfg)
    spec, robots, prompt = robot_of(cfg)
    made = offline(cfg)
    trainer = made.trainer
    was_pretrained = bool(cfg.vlm.get("pretrained")) and str(cfg.vlm.get("checkpoint", "")) != ""
    notes = []
    if was_pretrained:
        notes.append(f"sizes are those of vlm.config, not read from {cfg.vlm.checkpoint}")
    target = str(made.optim.get("_target_", "")).rpartition(".")[2]
    eight_bit = "8bit" in target or (target == "paged_adamw" and made.optim.get("bits") == 8)
    state_bytes = eight_bit_state if eight_bit else None
    optimizer: Callable[[Any], Any] = build(made.optim, "optim")
    if target == "paged_adamw":
        notes.append("paged optimiser state is counted as if it stayed on the device")
        state_bytes = state_bytes or (lambda parameter: 8 * parameter.numel())
    augmentation = made.data.get("augmentation")
    augment = build(augmentation, "data.augmentation") if augmentation else None
    precision = str(trainer.precision)
    with weightless() as mode:
        framework = make_policy(made, mode, spec, robots)
        batch = make_batch(
            framework, mode, spec, int(made.data.batch_size), prompt, bytes_for_words=was_pretrained
        )
        cost = step_cost(
            framework,
            batch,
            optimizer,
            precision=precision,
            accumulate=int(trainer.accumulate_grad_batches),
            clip=trainer.gradient_clip_val,
            augment=None if augment is None else lambda b: augment(b, seed=(0, 0, 0)),
            state_bytes=state_bytes,
        )
    if any("EMA" in str(node.get("_target_")) for node in made.callbacks.values() if node):
        notes.append(f"callbacks=ema adds {gigabytes(MASTER * cost.trainable)} GB for the average")
        cost = with_average(cost)
    here = [(None, number_of_devices(trainer))] if devices is None else devices
    found = tuple(
        on_device(cost, chip, count, trainer, int(made.data.batch_size), mfu) for chip, count in here
    )
    notes += [f"strategy {d.shares.name} is not known here: counted as a full copy on each device"
              for d in found[:1] if not d.shares.known]  # fmt: skip
    whole = None
    if process and devices is None and runs_on_cpu(trainer):
        whole = process_memory(cfg, found[0].peak, cost.batch)
    return Estimate(cost, int(made.data.batch_size), precision, mfu, found, tuple(notes), whole)


def runs_on_cpu(trainer: DictConfig) -> bool:
    """Whether a run of this trainer on this machine computes on the CPU."""
    return str(trainer.accelerator) == "cpu" or not torch.cuda.is_available()


def with_average(cost: StepCost) -> StepCost:
    extra = MASTER * cost.trainable
    return replace(cost, optimizer=cost.optimizer + extra, peak=cost.peak + extra)


def number_of_devices(trainer: DictConfig) -> int:
    """Of all machines, as the trainer is configured; one where Lightning chooses."""
    each = trainer.get("devices", 1)
    number = len(each) if hasattr(each, "__len__") and not isinstance(each, str) else each
    return (int(number) if str(number).isdigit() and int(number) > 0 else 1) * int(
        trainer.get("num_nodes", 1)
    )


def on_device(
    cost: StepCost, chip: Chip | None, count: int, trainer: DictConfig, batch_size: int, mfu: float
) -> DeviceEstimate:
    """The step on each of `count` such devices under the trainer's strategy."""
    nodes = min(count, int(trainer.get("num_nodes", 1)))
    shares = shares_of(trainer.get("strategy"), count, nodes)
    precision = str(trainer.precision)
    weights, gradients, optimizer = float(cost.weights), float(cost.gradients), float(cost.optimizer)
    peak = float(cost.peak)
    if shares.master and "16" in precision:
        # DeepSpeed computes with 16-bit weights and gradients; the 32-bit ones are its optimiser's.
        peak -= (weights + gradients) / 2
        weights, gradients, optimizer = weights / 2, gradients / 2, optimizer + MASTER * cost.trainable
        peak += MASTER * cost.trainable
    held = (weights * shares.weights, gradients * shares.gradients, optimizer * shares.optimizer)
    peak -= weights + gradients + optimizer - sum(held)
    if shares.gathers:
        peak += GATHERED_BLOCKS * cost.block
    host = 0.0
    for kind, aside in ((0, shares.host_weights), (2, shares.host_optimizer)):
        if aside:
            host, peak = host + held[kind], peak - held[kind]
    if chip is not None and chip.name in CHIPS:  # of another one the memory is what is free already
        peak += CONTEXT
    seconds = None
    rate = None if chip is None else chip.peak(precision)
    if chip is not None and rate is not None:
        seconds = (cost.flops + cost.recomputed) / (rate * mfu)
        if chip.bandwidth is not None:  # the optimiser reads weights, gradients and state, and writes two
            seconds += (2 * held[0] + held[1] + 2 * held[2]) / (chip.bandwidth * 1e9)
    accumulate = int(trainer.accumulate_grad_batches)
    samples = None if seconds is None else count * batch_size * accumulate / seconds
    return DeviceEstimate(chip, count, shares, *held, cost.activations, peak, host, seconds, samples)


def advice(cfg: DictConfig, cost: StepCost) -> list[str]:
    """Options that make a step smaller, those that help most first."""
    states = cost.weights + cost.gradients + cost.optimizer
    for_activations = [
        f"data.batch_size={max(1, int(cfg.data.batch_size) // 2)} "
        f"trainer.accumulate_grad_batches={2 * int(cfg.trainer.accumulate_grad_batches)}"
    ]
    if cfg.vlm.get("gradient_checkpointing") is False:
        for_activations.append("vlm.gradient_checkpointing=true")
    if str(cfg.trainer.precision).startswith("32"):
        for_activations.append("trainer.precision=bf16-mixed")
    for_states = ["trainer=fsdp2 with more devices (or deepspeed_zero3)", "optim=adamw_8bit"]
    if not cfg.get("adapter") and cfg.vlm.get("checkpoint"):
        for_states.append("adapter=lora")
    if not str(cfg.trainer.precision).endswith("-true") or str(cfg.trainer.precision).startswith("32"):
        for_states.append("trainer.precision=bf16-true")
    both = [for_activations, for_states]
    return [option for group in (both if cost.peak > 2 * states else both[::-1]) for option in group]


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g}"
