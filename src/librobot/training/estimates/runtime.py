"""`python -m librobot.training.estimates.runtime TARGET ...`: the resident bytes of a process that has
imported what a run imports, the TARGETs of its configuration included, and has trained a network of a few
kilobytes: code, tables, threads, and what libraries set up at their first use."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from typing import Any


def resident() -> int:
    """Bytes of this process that are in memory now (Linux)."""
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def train() -> None:
    """Two steps in Lightning's loop, through the kernels that policies use."""
    import torch
    from lightning import LightningModule, Trainer
    from torch import nn

    class Small(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.see, self.read = nn.Conv2d(3, 32, 3), nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
            self.act = nn.Conv1d(32, 8, 3)

        def training_step(self, images: torch.Tensor, number: int) -> torch.Tensor:
            read = self.read(self.see(images).flatten(2).mT)
            loss = self.act(read.mT).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), fused=True)

    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    images: Any = torch.rand(4, 3, 18, 18)
    trainer.fit(Small(), torch.utils.data.DataLoader(images, batch_size=2))


def main(targets: list[str]) -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from librobot.config.check import locate

    importlib.import_module("librobot.training.run")
    for target in targets:
        locate(target, "runtime")
    train()
    print(resident())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
