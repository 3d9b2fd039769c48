"""Training over several processes where Lightning's own strategies fall short."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from librobot.errors import LibrobotError
from librobot.nn.pretrained import unread_weights, weightless
from librobot.training.checkpoints import AtomicCheckpointIO
from librobot.training.parts import PartsWriter, load_whole, read_parts


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2, HSDP and tensor parallelism: a mesh of `replicate` x (what is left) x `tensor` processes.

    The policy is cut over the middle axis, in `replicate` copies; the processes of both axes each have a part
    of a batch. The `tensor` axis splits the matrices of blocks, and its processes share their samples. What
    is cut, and where, `librobot.frameworks.sharding` says. Works on GPUs (NCCL) and on CPUs (gloo). A
    checkpoint is one self-contained file, or, with `sharded_checkpoints`, a folder that every process writes
    its part of.
    """

    def __init__(
        self,
        replicate: int = 1,
        tensor: int = 1,
        sharded_checkpoints: bool = False,
        process_group_backend: str | None = None,
        timeout_minutes: float = 30,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=sharded_checkpoints,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )
        if replicate < 1 or tensor < 1:
            raise ValueError(f"replicate and tensor must be at least 1, found {replicate} and {tensor}")
        self.replicate, self.tensor = replicate, tensor
        self.in_parts = sharded_checkpoints
        self._parts: PartsWriter | None = None

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = 1, self.num_processes * self.num_nodes
        super().setup_environment()
        parts, left = divmod(self.world_size, self.replicate * self.tensor)
        if left or not parts:
            raise LibrobotError(
                f"trainer.strategy: replicate={self.replicate} x tensor={self.tensor} must divide the number "
                f"of processes, found {self.world_size} (trainer.devices x trainer.num_nodes)"
            )
        self._device_mesh = init_device_mesh(
            self.root_device.type,
            (self.replicate, parts, self.tensor),
            mesh_dim_names=("replicate", "shard", "tensor"),
        )
        self._device_mesh["replicate", "shard"]._flatten("data")
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        data = self.device_mesh["data"]
        return {"num_replicas": data.size(), "rank": data.get_local_rank()}

    # Checkpoints: the same contents in the same order as those of one process, whatever the mesh.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict()
        return state if self.in_parts else {name: self.gathered(value) for name, value in state.items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = plain.state_dict()
        if self.in_parts:
            return state
        values = {
            number: {key: self.gathered(value) for key, value in own.items()}
            for number, own in state["state"].items()
        }
        return {"state": values, "param_groups": state["param_groups"]}

    def gathered(self, value: Any) -> Any:
        """The whole of a tensor, in the first process's own memory; the others only help."""
        if not isinstance(value, DTensor):
            return value
        whole = value.full_tensor()
        return whole.cpu() if self.is_global_zero else None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        if self.in_parts:
            self.parts.save(checkpoint, Path(self.broadcast(filepath)))
        else:
            super(ModelParallelStrategy, self).save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Each process reads its own parts, of a file or of a folder that any number of processes wrote."""
        path = Path(self.broadcast(checkpoint_path))
        assert self.lightning_module is not None
        if path.is_dir():
            return read_parts(path, self.lightning_module, self.optimizers)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        load_whole(checkpoint, self.lightning_module, self.optimizers)
        return checkpoint

    @property
    def parts(self) -> PartsWriter:
        """What writes sharded checkpoints, by the run's own `AtomicCheckpointIO`."""
        if self._parts is None:
            assert isinstance(self.checkpoint_io, AtomicCheckpointIO)
            self._parts = PartsWriter(self.checkpoint_io)
        return self._parts

    def teardown(self) -> None:
        self.checkpoint_io.teardown()
        super().teardown()


def shards(strategy: Any) -> bool:
    """Whether a `trainer.strategy` node of the configuration spreads the weights by `ShardedStrategy`."""
    return isinstance(strategy, Mapping) and str(strategy.get("_target_", "")).endswith(".ShardedStrategy")


@contextmanager
def built_in_parts(cfg: Mapping[str, Any]) -> Iterator[None]:
    """Build a policy in here as its strategy spreads it: published weights stay in their files, of which each
    process reads its part later, and what is drawn at random the first process alone draws."""
    with ExitStack() as stack:
        if shards(cfg["trainer"].get("strategy")):
            if not is_first_process():
                stack.enter_context(weightless())
            if not builds_from_weights(cfg):
                stack.enter_context(unread_weights())
        yield


def builds_from_weights(cfg: Mapping[str, Any]) -> bool:
    """Whether the numbers of published weights are needed, or changed, while the policy is built."""
    adapter = cfg.get("adapter") or {}
    changed = adapter.get("dora") or adapter.get("init") in ("pissa", "olora")
    return bool(changed or cfg["head"].get("teacher"))


def keeps_parts(strategy: Any) -> bool:
    """Whether checkpoints of a strategy hold tensors as they are spread over its processes."""
    return isinstance(strategy, ShardedStrategy) and strategy.in_parts


def is_first_process() -> bool:
    """Whether this process is the run's first, as its launcher says: before processes have found together."""
    return all(
        os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    )


def check_machine(trainer: Mapping[str, Any]) -> None:
    """Raise LibrobotError where a `trainer=` node asks for what this machine lacks, with what would run."""
    if "fp8" in str(trainer.get("precision", "")):
        raise LibrobotError(
            f"trainer.precision={trainer['precision']}: 8-bit products come beside a precision; take "
            f"trainer.precision=bf16-mixed 'callbacks=[default,compute]' callbacks.compute.fp8=true"
        )
    strategy: Any = trainer.get("strategy")
    target = str(strategy.get("_target_", "") if isinstance(strategy, Mapping) else strategy or "")
    name = target.rpartition(".")[2]
    needs_gpu = name in ("FSDPStrategy", "DeepSpeedStrategy") or name.startswith(("fsdp", "deepspeed"))
    wanted, devices = str(trainer.get("accelerator", "auto")), trainer.get("devices", 1)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = "trainer=ddp, fsdp2, hsdp or tp with trainer.accelerator=cpu trainer.precision=32-true"
    here = f"trainer=cpu, or for several processes {here}"
    if needs_gpu and (found == 0 or wanted == "cpu"):
        why = "trainer.accelerator is cpu" if found else "this machine has none"
        raise LibrobotError(f"trainer.strategy: {name} runs on GPUs alone, and {why}; here runs {here}")
    if wanted in ("gpu", "cuda") and found == 0:
        raise LibrobotError(f"trainer.accelerator=gpu: torch sees no GPU on this machine; here runs {here}")
    if wanted in ("gpu", "cuda") and isinstance(devices, int) and devices > found:
        raise LibrobotError(
            f"trainer.devices={devices}: found {found} GPU{'s' * (found > 1)} here; set it to at most {found}"
        )
