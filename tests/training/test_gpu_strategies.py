"""Strategies for GPUs alone: their options compose, are checked, and become the objects that would train, on
a machine that pretends to have two GPUs. DeepSpeed's own configuration reads what it would get."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import open_dict
from small_runs import tiny
from torch.distributed.fsdp import ShardingStrategy

import tiny_models
from librobot.config.build import build_trainer
from librobot.config.check import check
from librobot.config.compose import compose
from librobot.errors import LibrobotError
from librobot.training.strategies import check_machine

OFFLOADED = {"device": "cpu"}
EXPECTED = {  # stage, 16-bit precision, what lies in the machine's memory
    "deepspeed_zero1": (1, False, False),
    "deepspeed_zero2": (2, False, False),
    "deepspeed_zero2_offload": (2, True, False),
    "deepspeed_zero3": (3, False, False),
    "deepspeed_zero3_offload": (3, True, True),
}


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr("lightning.fabric.accelerators.cuda.num_cuda_devices", lambda: 2)
    monkeypatch.setattr("lightning.pytorch.accelerators.cuda.num_cuda_devices", lambda: 2)
    monkeypatch.setattr("lightning.fabric.strategies.deepspeed.torch.cuda.is_available", lambda: True)


def trainer_of(option, tmp_path, *overrides):
    cfg = compose(
        [*tiny("pi0"), f"data.root={tmp_path}", f"trainer={option}", "callbacks=progress", *overrides]
    )
    with open_dict(cfg):
        cfg.run_dir, cfg.name = str(tmp_path), "tiny"
    check(cfg)
    with pytest.raises(
        LibrobotError, match="runs on GPUs alone, and this machine has none; here runs trainer=cpu"
    ):
        check_machine(cfg.trainer)
    return cfg


def test_every_option_is_tested():
    options = {name for name in tiny_models.options("trainer") if name.startswith(("fsdp", "deepspeed"))}
    assert options == {*EXPECTED, "fsdp", "fsdp2"}


@pytest.mark.slow  # to import deepspeed takes seconds
@pytest.mark.parametrize("option", EXPECTED)
def test_deepspeed(option, tmp_path, two_gpus):
    config_class = pytest.importorskip("deepspeed.runtime.config").DeepSpeedConfig
    cfg = trainer_of(option, tmp_path, "trainer.accumulate_grad_batches=4", "trainer.gradient_clip_val=0.5")
    trainer = build_trainer(cfg)
    strategy = trainer.strategy
    strategy._lightning_module = SimpleNamespace(trainer=trainer)
    strategy._format_config()
    read = config_class(strategy.config)
    stage, optimizer, parameters = EXPECTED[option]
    zero = read.zero_config
    assert zero.stage == stage
    assert (zero.offload_optimizer is not None) == optimizer
    assert (zero.offload_param is not None) == parameters
    assert read.train_micro_batch_size_per_gpu == cfg.data.batch_size
    assert read.gradient_accumulation_steps == 4
    assert read.gradient_clipping == 0.5
    assert trainer.num_devices == 2
    assert read.bfloat16_config.enabled


def test_fsdp(tmp_path, two_gpus):
    trainer = build_trainer(trainer_of("fsdp", tmp_path))
    strategy = trainer.strategy
    assert type(strategy).__name__ == "FSDPStrategy"
    assert strategy.sharding_strategy is ShardingStrategy.FULL_SHARD
    assert strategy.kwargs["use_orig_params"] is True
    assert strategy._state_dict_type == "full"
    assert strategy.mixed_precision_config.param_dtype is torch.bfloat16
    other = build_trainer(trainer_of("fsdp", tmp_path, "trainer.strategy.sharding_strategy=SHARD_GRAD_OP"))
    assert other.strategy.sharding_strategy is ShardingStrategy.SHARD_GRAD_OP
