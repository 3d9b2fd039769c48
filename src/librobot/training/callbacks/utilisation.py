"""How much of what the device could compute a run uses, and how much memory."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from librobot.training.estimates.chips import chip_of
from librobot.training.estimates.ledger import Ledger


class Utilisation(Callback):
    """Logs `speed/tflops`, operations in 1e12 a second on each device, `speed/mfu`, their share of the
    device's peak (Chowdhery et al. 2022: what activation checkpointing computes again does not count), and
    `speed/memory_gb`, the most memory so far (of a CPU, of the whole process), in the steps that are logged.

    The operations are counted in one step, the second of a run; inside of what is compiled they are not seen.
    `peak_tflops` is the device's, in the run's precision; None takes the data sheet's, and without one (a
    CPU, a GPU that `librobot.training.estimates.chips` lacks) no `speed/mfu` is logged. Time is that of the
    steps alone, with the wait for their data, without validation and checkpoints.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and peak_tflops <= 0:
            raise ValueError(f"peak_tflops must be above 0, found {peak_tflops}")
        self.given = peak_tflops
        self.peak: float | None = None
        self.flops = 0.0  # of a batch
        self.counting: Ledger | None = None
        self.ended: float | None = None  # when the last step did; None where something else came between
        self.seconds, self.batches, self.seen = 0.0, 0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ended, self.seconds, self.batches = None, 0.0, 0
        self.peak = None if self.given is None else self.given * 1e12
        if self.given is None and pl_module.device.type == "cuda":
            chip = chip_of(torch.cuda.get_device_name(pl_module.device))
            self.peak = None if chip is None else chip.peak(str(trainer.precision))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.seen += 1
        if self.seen == 2 and not self.flops:
            self.counting = Ledger(memory=False)
            self.counting.__enter__()
        if self.ended is None:
            self.ended = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.counting is not None:
            self.stop_counting()
            self.ended = None  # counting takes time
            return
        now = time.perf_counter()
        assert self.ended is not None
        self.seconds, self.batches, self.ended = self.seconds + now - self.ended, self.batches + 1, now
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        pl_module.log("speed/memory_gb", memory(pl_module.device) / 1e9)
        if self.flops:
            rate = self.flops * self.batches / self.seconds
            pl_module.log("speed/tflops", rate / 1e12)
            if self.peak is not None:
                pl_module.log("speed/mfu", rate / self.peak)
        self.seconds, self.batches = 0.0, 0

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.stop_counting()

    def stop_counting(self) -> None:
        if self.counting is not None:
            self.counting.__exit__(None, None, None)
            self.flops, self.counting = float(self.counting.flops), None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.ended = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ended = None


def memory(device: torch.device) -> float:
    """Bytes: the most that torch had allocated on a GPU, or that this process had of a machine's memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
