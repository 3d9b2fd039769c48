"""debug=profile: steps timed by phase, steps traced by torch, and a page that says what they wait for."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile

from librobot.training.profiling.summary import PHASES, Operator, Summary, write_summary

SNAPSHOT_ENTRIES = 100_000


class ProfileSteps(Callback):
    """Writes DIR/summary.html and DIR/trace.json (for ui.perfetto.dev), and on a GPU DIR/memory.pickle (for
    pytorch.org/memory_viz).

    `skip` steps warm up, `steps` are timed (on a GPU, which is waited for after every phase), `traced` ones
    run under torch's profiler, which slows them down, and are not timed. Only the first process writes.
    """

    def __init__(self, dirpath: str, skip: int = 3, steps: int = 10, traced: int = 3) -> None:
        for name, value, least in (("skip", skip, 1), ("steps", steps, 1), ("traced", traced, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, found {value}")
        self.folder = Path(dirpath)
        self.skip, self.steps, self.traced = skip, steps, traced
        self.number = 0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.last = 0.0
        self.profiler: profile | None = None
        self.snapshots = False
        self.samples = 0
        self.device = torch.device("cpu")
        self._to_device: Callable[..., Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            self.number = 10**9  # only counts on
        self.device = pl_module.device
        self._to_device = trainer.strategy.batch_to_device

        def timed(*args: Any, **kwargs: Any) -> Any:
            assert self._to_device is not None
            self.lap("data wait")
            moved = self._to_device(*args, **kwargs)
            self.lap("transfer")
            return moved

        trainer.strategy.batch_to_device = timed  # type: ignore[method-assign]
        self.last = self.now()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.lap("other")

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.lap("forward")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self.lap("forward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.lap("backward")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.lap("optimiser")
        if self.timing:
            self.samples += batch.batch_size
        self.number += 1
        if self.number == self.skip + self.steps:
            self.start_trace()
        elif self.number == self.skip + self.steps + self.traced:
            self.finish(pl_module)
        self.last = self.now()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._to_device is not None:
            trainer.strategy.batch_to_device = self._to_device  # type: ignore[method-assign]
            self._to_device = None
        if 0 < self.number < self.skip + self.steps + self.traced:
            self.finish(pl_module)  # a run of fewer steps: what there is

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.profiler is not None:
            self.profiler.stop()
            self.profiler = None

    @property
    def timing(self) -> bool:
        return self.skip <= self.number < self.skip + self.steps

    def lap(self, phase: str) -> None:
        """The time since the last lap belongs to `phase`."""
        if not self.timing:
            return
        now = self.now()
        self.seconds[phase] += now - self.last
        self.last = now

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start_trace(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)
            self.snapshots = True
        self.profiler = profile(activities=activities, profile_memory=True, record_shapes=True)
        self.profiler.start()

    def finish(self, pl_module: LightningModule) -> None:
        """Write the trace, the snapshot and the page."""
        self.folder.mkdir(parents=True, exist_ok=True)
        operators: list[Operator] = []
        if self.profiler is not None:
            self.profiler.stop()
            partial = self.folder / ".trace.json.tmp"
            self.profiler.export_chrome_trace(str(partial))
            partial.replace(self.folder / "trace.json")
            operators = top_operators(self.profiler, self.device.type)
            self.profiler = None
        if self.snapshots:
            torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        timed = max(0, min(self.number, self.skip + self.steps) - self.skip)
        summary = Summary(
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU",
            steps=timed,
            samples=self.samples,
            seconds=dict(self.seconds),
            operators=operators,
            precision=str(pl_module.trainer.precision),
            workers=int(getattr(pl_module.trainer.datamodule, "num_workers", 0)),  # type: ignore[attr-defined]
        )
        print(f"profile: {write_summary(self.folder / 'summary.html', summary)}", flush=True)
        self.number = 10**9


def top_operators(profiler: profile, device: str, count: int = 15) -> list[Operator]:
    """Those that took most time by themselves, on the device that the run is on."""
    name = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = [e for e in profiler.key_averages() if not e.key.startswith(("ProfilerStep", "[memory]"))]
    total = sum(float(getattr(event, name)) for event in events) or 1.0
    largest = sorted(events, key=lambda event: -float(getattr(event, name)))[:count]
    return [
        Operator(
            event.key,
            int(event.count),
            float(getattr(event, name)) / 1e3,
            float(getattr(event, name)) / total,
        )
        for event in largest
    ]
