"""How the blocks of a policy compute: the precision of products, recomputation, compilation, 8-bit floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
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
    is a mode of torch.compile, for each block alone.

    `fp8` multiplies the matrices of blocks in 8 bits, forward and backward, with scales that each tensor gets
    anew (Micikevicius et al. 2022; torchao's float8 training): weights, optimiser and checkpoints stay as
    they are. True needs a GPU that has such products; "emulated" rounds alike and multiplies in the run's
    precision, on any device: slower, and it shows what the rounding does to a loss.
    """

    def __init__(
        self,
        matmul: Matmul | None = None,
        recompute: bool = False,
        compile: str | None = None,
        fp8: bool | Literal["emulated"] = False,
    ) -> None:
        if matmul not in (None, "highest", "high", "medium"):
            raise ValueError(f"matmul must be null, highest, high or medium, found {matmul!r}")
        if compile is not None and compile not in COMPILE_MODES:
            raise ValueError(f"compile must be null or one of {', '.join(COMPILE_MODES)}, found {compile!r}")
        if fp8 not in (True, False, "emulated"):
            raise ValueError(f"fp8 must be true, false or emulated, found {fp8!r}")
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
            check_fp8(trainer, emulated=self.fp8 == "emulated")
            count = to_fp8(blocks, emulated=self.fp8 == "emulated")
            rank_zero_info(f"callbacks.compute.fp8: {count} linear layers of blocks multiply in 8 bits")
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


def check_fp8(trainer: Trainer, *, emulated: bool) -> None:
    """Raise LibrobotError where 8-bit products cannot be, with what to take in their place."""
    if getattr(trainer.strategy, "tensor", 1) > 1:
        raise LibrobotError(
            "callbacks.compute.fp8: the matrices of 8-bit products are not split over devices "
            "(trainer.strategy.tensor above 1); take trainer=fsdp2, or set it to false"
        )
    device = trainer.strategy.root_device
    has = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if emulated or (has is not None and has >= FP8_FROM):
        return
    found = f"a {device.type.upper()}"
    if has is not None:
        found = f"{torch.cuda.get_device_name(device)} ({has[0]}.{has[1]})"
    raise LibrobotError(
        f"callbacks.compute.fp8: 8-bit products need a GPU of compute capability 8.9 or later (Ada, Hopper, "
        f"Blackwell), found {found}; set it to false and take trainer.precision=bf16-mixed, or to emulated "
        f"to see what the rounding does"
    )


def to_fp8(blocks: Sequence[nn.Module], *, emulated: bool = False) -> int:
    """Make the linear layers of blocks multiply in 8 bits, in place; how many. Parameters stay the same ones,
    under the same names. Raises LibrobotError where no layer can."""
    float8: Any = require("torchao.float8", "fp8")
    # Products over tokens, whose number is no multiple of 16, are padded: the gradients of weights.
    config = float8.Float8LinearConfig(emulate=emulated, pad_inner_dim=True)
    for block in blocks:
        float8.convert_to_float8_training(block, module_filter_fn=fits_fp8, config=config)
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
    converted = [layer for layer in layers if type(layer).__name__ == "Float8Linear"]
    if not converted:
        widths = sorted({(layer.in_features, layer.out_features) for layer in layers})
        raise LibrobotError(
            f"callbacks.compute.fp8: no linear layer of the framework's blocks has widths that are multiples "
            f"of 16, found {widths or 'no layer at all'}; set it to false"
        )
    return len(converted)


def fits_fp8(module: nn.Module, name: str) -> bool:
    """Whether a layer is a plain one (a quantised one has its own products; torch's own attention reads the
    weight of its last one and does not call it), of widths that 8-bit products take: multiples of 16."""
    return type(module) is nn.Linear and module.in_features % 16 == 0 and module.out_features % 16 == 0
