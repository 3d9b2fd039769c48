"""How much of a policy's memory each device holds under a Lightning strategy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shares:
    """The share of weights, gradients and optimiser state on each device.

    `gathers` says that sharded weights are put together block by block while they are used; `host_weights`,
    `host_optimizer` that a share lies in the machine's memory instead. `master` is True where 16-bit weights
    have a 32-bit copy beside the optimiser state. `known` is False for a strategy that this table lacks: each
    device is then taken to hold all.
    """

    name: str
    weights: float = 1.0
    gradients: float = 1.0
    optimizer: float = 1.0
    gathers: bool = False
    host_weights: bool = False
    host_optimizer: bool = False
    master: bool = False
    known: bool = True


def shares_of(strategy: Any, devices: int, nodes: int = 1) -> Shares:
    """The shares under `trainer.strategy`, a name or a node of the configuration, with `devices` in all, of
    which `devices / nodes` are on each machine."""
    node = dict(strategy) if isinstance(strategy, Mapping) else {}
    name = str(node.get("_target_", strategy)).rpartition(".")[2]
    part = 1.0 / devices
    kind = name.lower()
    if "deepspeed" in kind:
        return deepspeed(node, kind, part)
    if "modelparallel" in kind or "shardedstrategy" in kind:
        return model_parallel(name, node, devices)
    if "fsdp" in kind:
        return fsdp(name, node, devices, nodes)
    known = strategy is None or any(word in kind for word in ("auto", "ddp", "single", "none"))
    return Shares(name, known=known)


def fsdp(name: str, node: Mapping[str, Any], devices: int, nodes: int) -> Shares:
    method = str(node.get("sharding_strategy", "FULL_SHARD")).upper()
    part = 1.0 / (max(1, devices // nodes) if "HYBRID" in method else devices)
    label = f"{name} {method}"
    if method == "NO_SHARD":
        return Shares(label)
    if "GRAD_OP" in method or "ZERO2" in method:
        return Shares(label, 1.0, part, part)
    return Shares(label, part, part, part, gathers=True)


def model_parallel(name: str, node: Mapping[str, Any], devices: int) -> Shares:
    """Each of `replicate` copies is cut over its devices, whether by data or by tensor parallelism."""
    replicas = min(int(node.get("replicate") or 1), devices)
    part = replicas / devices
    tensor = int(node.get("tensor") or 1)
    label = f"{name} {replicas} x {max(1, devices // replicas // tensor)} x {tensor}"
    return Shares(label, part, part, part, gathers=True)


def deepspeed(node: Mapping[str, Any], kind: str, part: float) -> Shares:
    digit = next((c for c in kind if c.isdigit()), "2")
    stage = int(node.get("stage", digit))
    return Shares(
        f"DeepSpeed ZeRO {stage}",
        weights=part if stage >= 3 else 1.0,
        gradients=part if stage >= 2 else 1.0,
        optimizer=part if stage >= 1 else 1.0,
        gathers=stage >= 3,
        host_weights=bool(node.get("offload_parameters")),
        host_optimizer=bool(node.get("offload_optimizer")),
        master=True,
    )
