"""A callback that notes which samples each process trained on, and can have one killed meanwhile."""

import json
import os
import signal
import time
from pathlib import Path

from lightning.pytorch.callbacks import Callback


class Seen(Callback):
    """Appends {"step", "samples"} to FOLDER/seenRANK.jsonl before each step; a sample is its state's first
    number.

    At the beginning of step `kill_step` process `kill_rank` notes the time in FOLDER/killed and is gone.
    """

    def __init__(self, folder: str, kill_rank: int | None = None, kill_step: int = 0) -> None:
        self.folder = Path(folder)
        self.kill_rank, self.kill_step = kill_rank, kill_step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.kill_rank == trainer.global_rank and trainer.global_step == self.kill_step:
            (self.folder / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        line = {
            "step": trainer.global_step,
            "samples": [round(row) for row in batch.observation.state[:, -1, 0].tolist()],
        }
        with (self.folder / f"seen{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def seen(folder: Path, rank: int) -> list[tuple[int, list[int]]]:
    """Step and samples, in the order in which they were trained on."""
    lines = (json.loads(line) for line in (folder / f"seen{rank}.jsonl").read_text().splitlines())
    return [(line["step"], line["samples"]) for line in lines]
