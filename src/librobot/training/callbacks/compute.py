"""How the blocks of a policy compute: the precision of products, recomputation, compilation, 8-bit floats."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from librobot.errors import LibrobotError, require
from librobot.frameworks.action_expert import COMPILE_MODES
from librobot.frameworks.base import Framework
from librobot.frameworks.sharding import blocks_of
from librobot.vlms.blocks import recompute

Matmul = Literal["highest", "high", "medium"]
FP8_FROM = (8, 9)  # compute capability: Ada; Hopper is 9.0


class Compute(Callback):
    """Set once, before the policy is sharded, on every block that its framework declares (`block_lists`) and
    on the backbone's.

    `matmul` is the precision of float32 products on GPUs (torch.set_float32_matmul_precision): `high` is
    TF32. It is put back after the run. `recompute` is activation checkpointing (Chen et al. 2016). `compile`
    is a mode of torch.compile, for each block alone. `fp8` multiplies the matrices of blocks in 8 bits with
    scales for each tensor (torchao's float8 training), where the GPU has such products.
    """

    def __init__(
        self,
        matmul: Matmul | None = None,
        recompute: bool = False,
        compile: str | None = None,
        fp8: bool = False,
    ) -> None:
        if matmul not in (None, "highest", "high", "medium"):
            raise ValueError(f"matmul must be null, highest, high or medium, found {matmul!r}")
        if compile is not None and compile not in COMPILE_MODES:
            raise ValueError(f"compile must be null or one of {', '.join(COMPILE_MODES)}, found {compile!r}")
        self.matmul, self.recompute, self.compile, self.fp8 = matmul, recompute, compile, fp8
        self.before: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, Framework)
        if self.matmul is not None:
            self.before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(self.matmul)
        if not (self.recompute or self.compile or self.fp8):
            return
        blocks = list(blocks_of(pl_module).values())
        if self.fp8:
            to_fp8(blocks, trainer.strategy.root_device)
        if self.recompute:
            recompute(nn.ModuleList(blocks))
        if pl_module.vlm is not None:
            pl_module.vlm.stops_early = False  # what runs again, or compiled, goes to its end
        if self.compile:
            for block in blocks:
                block.compile(mode=self.compile)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.before is not None:
            torch.set_float32_matmul_precision(self.before)
            self.before = None


def to_fp8(blocks: list[nn.Module], device: torch.device) -> None:
    """Make the linear layers of blocks multiply in 8 bits. Raises LibrobotError where the device does not."""
    has = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if has is None or has < FP8_FROM:
        found = f"a {device.type.upper()}"
        if has is not None:
            found = f"{torch.cuda.get_device_name(device)} ({has[0]}.{has[1]})"
        raise LibrobotError(
            f"callbacks.compute.fp8: 8-bit products need a GPU of compute capability 8.9 or later (Ada, "
            f"Hopper, Blackwell), found {found}; set it to false and take trainer.precision=bf16-mixed"
        )
    float8: Any = require("torchao.float8", "fp8")
    for block in blocks:
        float8.convert_to_float8_training(block, module_filter_fn=fits_fp8)


def fits_fp8(module: nn.Module, name: str) -> bool:
    """Hopper's 8-bit products take widths that are multiples of 16."""
    return isinstance(module, nn.Linear) and module.in_features % 16 == 0 and module.out_features % 16 == 0
