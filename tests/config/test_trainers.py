"""Every trainer composes and names arguments that exist; the sharded ones say what they share out."""

import pytest
from omegaconf import OmegaConf

from librobot.config.build import build
from librobot.config.check import check
from librobot.config.compose import compose
from librobot.training.strategies import ShardedStrategy, shards
from tiny_models import options

TRAINERS = options("trainer")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_composes_and_its_arguments_exist(trainer):
    cfg = compose([f"trainer={trainer}", "data=lerobot", "data.root=x", "run_dir=y"])
    check(cfg)
    assert cfg.trainer._target_ == "lightning.Trainer"


def test_the_ones_there_should_be():
    stages = {f"deepspeed_zero{stage}" for stage in ("1", "2", "3", "2_offload", "3_offload")}
    assert {"cpu", "gpu", "ddp", "fsdp", "fsdp2", "hsdp", "tp", "slurm", *stages} <= set(TRAINERS)


@pytest.mark.parametrize(("trainer", "replicate", "tensor"), [("fsdp2", 1, 1), ("hsdp", 2, 1), ("tp", 1, 2)])
def test_sharded_trainers_say_their_mesh(trainer, replicate, tensor):
    node = compose([f"trainer={trainer}"]).trainer.strategy
    assert shards(node)
    strategy = build(node, "trainer.strategy")
    assert isinstance(strategy, ShardedStrategy)
    assert (strategy.replicate, strategy.tensor, strategy.in_parts) == (replicate, tensor, False)
    assert not shards(OmegaConf.create({"_target_": "lightning.pytorch.strategies.DDPStrategy"}))
    assert not shards("auto")


@pytest.mark.parametrize("trainer", [name for name in TRAINERS if name.startswith("deepspeed")])
def test_deepspeed_says_what_it_shares_out(trainer):
    strategy = compose([f"trainer={trainer}"]).trainer.strategy
    assert strategy.stage == int(trainer[len("deepspeed_zero")])
    assert strategy.offload_optimizer == trainer.endswith("offload")
    assert strategy.get("offload_parameters", False) == (trainer == "deepspeed_zero3_offload")
