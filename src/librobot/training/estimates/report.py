"""An estimate as a table, and what to do about a batch that does not fit."""

from __future__ import annotations

from dataclasses import replace

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from librobot.training.estimates.estimate import DeviceEstimate, Estimate, advice, gigabytes
from librobot.training.estimates.process import ProcessMemory

WIDTH = 120


def print_estimate(found: Estimate, cfg: DictConfig, console: Console | None = None) -> None:
    console = console or Console()
    console.width = max(console.width, WIDTH)  # a narrow table cannot be read
    cost = found.cost
    console.print(
        f"parameters {cost.parameters:,}, of which {cost.trainable:,} train; batch of {found.batch_size}, "
        f"precision {found.precision}",
        highlight=False,
        soft_wrap=True,
    )
    again = f", and {cost.recomputed / 1e12:.3g} recomputed" if cost.recomputed else ""
    console.print(f"an optimiser step: {cost.flops / 1e12:.3g} TFLOP on a device{again}", highlight=False)
    table = Table(title="memory in GB (1e9 bytes) on each device", title_justify="left")
    table.add_column("devices")
    for heading in (
        "weights", "gradients", "optimiser", "activations", "peak", "there are", "step", "samples/s"
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for device in found.devices:
        table.add_row(*row(device))
    console.print(table)
    if found.process is not None:
        console.print(process_line(found.process), highlight=False, soft_wrap=True)
    for line in (*found.notes, *warnings_of(found, cfg)):
        console.print(line, highlight=False, soft_wrap=True)
    if any(device.seconds is not None for device in found.devices):
        console.print(
            f"time: operations at {found.mfu:.0%} of the device's peak (--mfu), and the optimiser's memory "
            f"traffic; without waiting for data or other devices",
            highlight=False,
            soft_wrap=True,
        )


def process_line(whole: ProcessMemory) -> str:
    """All that a training process on a CPU has, and its data workers."""
    said = (
        f"each training process, GB resident: {gigabytes(whole.total)} = runtime {gigabytes(whole.runtime)} "
        f"(interpreter, libraries, threads: measured here) + tensors {gigabytes(whole.tensors)} "
        f"+ batches ahead {gigabytes(whole.ahead)}"
    )
    if whole.num_workers:
        said += f"; its {whole.num_workers} data workers prepare {gigabytes(whole.workers)} of batches"
    return said


def row(device: DeviceEstimate) -> list[str]:
    name = "this machine" if device.chip is None else device.chip.name
    kinds = (device.weights, device.gradients, device.optimizer, device.activations, device.peak)
    time = "" if device.seconds is None else f"{device.seconds:.3g} s"
    speed = "" if device.samples_per_second is None else f"{device.samples_per_second:,.0f}"
    label = f"{device.count} x {name}, {device.shares.name}"
    return [label, *map(gigabytes, kinds), f"{device.memory:.4g}", time, speed]


def warnings_of(found: Estimate, cfg: DictConfig) -> list[str]:
    """A sentence for each kind of device that the batch does not fit into."""
    said = []
    for device in found.devices:
        if device.chip is None and found.process is not None and found.process.total > device.memory * 1e9:
            device = replace(device, peak=found.process.total)
        if device.fits:
            continue
        name = "this machine" if device.chip is None else f"each {device.chip.name}"
        said.append(
            f"does not fit: a step takes {gigabytes(device.peak)} GB on {name}, which has "
            f"{device.memory:.4g} GB; what helps, most first: {'; '.join(advice(cfg, found.cost))}"
        )
    return said
