"""Regular checkpoints, one at the end, and one when the run is told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from librobot.errors import LibrobotError
from librobot.training.callbacks.optimizer_steps import OptimizerStepCallback
from librobot.training.checkpoints import AtomicCheckpointIO
from librobot.training.loggers import CSVLogger


class Stopped(LibrobotError):
    """The run was told to stop, and has saved where it was."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class SaveCheckpoints(OptimizerStepCallback, Checkpoint):
    """Keep `dirpath/last.ckpt` up to date, every `every_n_steps` optimiser steps and at the end.

    With `keep_every_n_steps` the checkpoints at these steps stay, as step=00001000.ckpt. Checkpoints are
    taken at the end of a training batch, never at the end of an epoch: only there does resuming repeat and
    skip nothing.

    With `asynchronous` training goes on as soon as a checkpoint is copied to the CPU's memory, and a thread
    writes it.
    """

    def __init__(
        self,
        dirpath: str,
        every_n_steps: int = 500,
        keep_every_n_steps: int | None = None,
        asynchronous: bool = False,
    ) -> None:
        if every_n_steps < 1 or (keep_every_n_steps is not None and keep_every_n_steps < 1):
            raise ValueError("every_n_steps and keep_every_n_steps must be at least 1")
        self.dirpath = Path(dirpath)
        self.every_n_steps = every_n_steps
        self.keep_every_n_steps = keep_every_n_steps
        self.asynchronous = asynchronous
        self.saved_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        io = trainer.strategy.checkpoint_io
        if self.asynchronous and not isinstance(io, AtomicCheckpointIO):
            raise LibrobotError(
                f"callbacks.checkpoints.asynchronous: {type(trainer.strategy).__name__} writes checkpoints "
                f"itself; set it to false, or take trainer=fsdp2"
            )
        if isinstance(io, AtomicCheckpointIO):
            io.asynchronous = self.asynchronous

    def on_optimizer_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        log_row(trainer)
        if self.keep_every_n_steps and step % self.keep_every_n_steps == 0:
            trainer.save_checkpoint(self.dirpath / f"step={step:08d}.ckpt", weights_only=False)
        if step % self.every_n_steps == 0 or is_last_step(trainer):
            self.save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step not in (self.saved_step, 0):
            self.save_last(trainer)  # stopped by a time limit or by another callback
        settle(trainer)

    def save_last(self, trainer: Trainer) -> Path:
        """Save last.ckpt; every process of the run has to call this at the same step."""
        path = self.dirpath / "last.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        self.saved_step = trainer.global_step
        return path


def log_row(trainer: Trainer) -> None:
    """Write this step's row of metrics.csv before the checkpoint of the step.

    Lightning logs a step after its callbacks, and does so again: the row is then the same one. A process that
    is killed between the two would go on behind a step that has no row.
    """
    loggers = trainer.loggers
    trainer.loggers = [logger for logger in loggers if isinstance(logger, CSVLogger)]
    try:
        trainer._logger_connector.update_train_step_metrics()  # Lightning's own, as it has no public one
    finally:
        trainer.loggers = loggers


def settle(trainer: Trainer) -> None:
    """Until what is being written is there; raises what went wrong with it."""
    io = trainer.strategy.checkpoint_io
    if isinstance(io, AtomicCheckpointIO):
        io.wait()


class SaveOnSignal(OptimizerStepCallback):
    """On SIGTERM or SIGINT: finish the current optimiser step, save last.ckpt, end the run with a message.

    The run ends before the next step, so that the metrics of this one are still logged; a second signal ends
    it at once. The processes of several devices agree on the step by a reduction every `agree_every_n_steps`
    steps, so that they all save the same one.

    With `requeue` a Slurm job that got SIGTERM (a preemption, or #SBATCH --signal=TERM@120 before the time
    limit) goes back into the queue once it has saved; its command then needs run_dir=DIR ckpt=auto.
    """

    def __init__(self, agree_every_n_steps: int = 10, requeue: bool = False) -> None:
        if agree_every_n_steps < 1:
            raise ValueError(f"agree_every_n_steps must be at least 1, found {agree_every_n_steps}")
        self.agree_every_n_steps = agree_every_n_steps
        self.requeue = requeue
        self.received: int | None = None
        self.stopped: Stopped | None = None
        self.before: dict[int, Any] = {}
        self.process = os.getpid()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.process = os.getpid()
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self.receive)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: only takes a note."""
        if os.getpid() != self.process or self.received is not None:
            signal.signal(number, signal.SIG_DFL)  # a forked data worker, or the second signal
            os.kill(os.getpid(), number)
            return
        self.received = number

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.end()
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end()

    def end(self) -> None:
        """End the run where a checkpoint was saved because of a signal."""
        if self.stopped:
            raise self.stopped

    def on_optimizer_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if is_last_step(trainer):
            return
        number = self.agreed(trainer, step)
        if not number:
            return
        name = signal.Signals(number).name
        checkpoints = [c for c in trainer.checkpoint_callbacks if isinstance(c, SaveCheckpoints)]
        if not checkpoints:
            text = f"stopped by {name} after step {step}; nothing saved (no checkpoint callback)"
            self.stopped = Stopped(text, 128 + number)
            return
        path = checkpoints[0].save_last(trainer)
        settle(trainer)
        queued = ""
        if self.requeue and number == signal.SIGTERM and trainer.is_global_zero:
            queued = f"{requeue_job()}; "
        self.stopped = Stopped(
            f"stopped by {name} after step {step}, saved {path}; {queued}"
            f"go on with the same command and run_dir={trainer.default_root_dir} ckpt=last",
            128 + number,
        )

    def agreed(self, trainer: Trainer, step: int) -> int:
        """The signal that any process of the run received, 0 for none."""
        if trainer.world_size == 1:
            return self.received or 0
        if step % self.agree_every_n_steps:
            return 0
        received = torch.tensor(self.received or 0, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


def requeue_job() -> str:
    """Put the Slurm job that this is back into the queue; what became of that, in words."""
    job = os.environ.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in os.environ and "SLURM_ARRAY_TASK_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job is None:
        return "not put back into a queue (callbacks.save_on_signal.requeue, but no Slurm job)"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"job {job} could not be put back into the queue ({error})"
    if done.returncode != 0:
        return f"job {job} could not be put back into the queue ({done.stderr.strip() or done.returncode})"
    return f"job {job} is back in the queue"


def is_last_step(trainer: Trainer) -> bool:
    """Whether the run ends with this step because of max_steps or the last batch of max_epochs."""
    if 0 < trainer.max_steps <= trainer.global_step:
        return True
    epochs = trainer.max_epochs
    return bool(
        epochs
        and epochs > 0
        and trainer.current_epoch + 1 >= epochs
        and trainer.fit_loop.epoch_loop._is_training_done
    )
