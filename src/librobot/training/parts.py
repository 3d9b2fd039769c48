"""Sharded checkpoints in a run: written by all processes, put in place at once, read into any mesh."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.optim import Optimizer

from librobot.checkpoint_path import REST
from librobot.frameworks.checkpoint import AVERAGE
from librobot.frameworks.sharded_files import (
    put_together,
    read_into,
    read_rest,
    shapes_of,
    take_apart,
)
from librobot.frameworks.sharding import spread_like
from librobot.training.checkpoints import AtomicCheckpointIO, not_saved


class PartsWriter:
    """Writes folders: under a temporary name first, which a link by the checkpoint's own name then replaces.

    Where `io` is asynchronous the tensors are copied to the CPU's memory and written while training goes on;
    the first process puts the folder in place when all have written.
    """

    def __init__(self, io: AtomicCheckpointIO) -> None:
        self.io = io
        self.number = 0
        self.group: Any = None

    def save(self, checkpoint: dict[str, Any], target: Path) -> None:
        """Every process has to call this."""
        self.io.wait()
        first = dist.get_rank() == 0
        self.number += 1
        folder = target.with_name(f".{target.name}.{checkpoint['global_step']:08d}-{self.number}.tmp")
        tensors, rest = take_apart(checkpoint)
        try:
            if first:
                clear(target, keep=current(target))
                folder.mkdir(parents=True)
                torch.save(rest, folder / REST)
        except (OSError, RuntimeError) as error:
            raise not_saved(target, error) from error
        dist.barrier()
        writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
        if self.io.asynchronous:
            if self.group is None:  # its own: the thread's messages must not meet training's
                self.group = dist.new_group(backend="gloo")
            future: Any = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)
            self.io.start(lambda: self.finish(future.result, folder, target, first))
        else:
            self.finish(lambda: dcp.save(tensors, storage_writer=writer), folder, target, first)
            dist.barrier()

    def finish(self, written: Any, folder: Path, target: Path, first: bool) -> None:
        """Wait until all has been written, then put it in place."""
        try:
            written()
            if first:
                put_in_place(folder, target)
                self.io.tell(target)
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            if first:
                shutil.rmtree(folder, ignore_errors=True)
            raise not_saved(target, error) from error


def put_in_place(folder: Path, target: Path) -> None:
    """`target` becomes a link to what `folder` holds, in one step; what it was before goes."""
    final = folder.with_suffix("")
    folder.rename(final)
    link = target.with_name(f".{target.name}.link")
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    link.replace(target)
    clear(target, keep=final.name)


def current(target: Path) -> str | None:
    """The name of the folder that `target` stands for."""
    return target.readlink().name if target.is_symlink() else None


def clear(target: Path, keep: str | None) -> None:
    """Remove folders of `target` that are not in use: earlier ones, and what a killed process left."""
    for left in target.parent.glob(f".{target.name}.*"):
        if left.is_dir() and not left.is_symlink() and left.name != keep:
            shutil.rmtree(left, ignore_errors=True)


def read_parts(folder: Path, module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Load the weights and the optimisers' state from a folder, each process its own parts; returns the
    checkpoint's other contents, the average's parts among them."""
    weights = {f"weights.{name}": value.detach() for name, value in module.state_dict().items()}
    by_name = dict(module.named_parameters())
    in_order = [[p for group in o.param_groups for p in group["params"]] for o in optimizers]
    tensors: dict[str, Any] = dict(weights)
    for place, stored in shapes_of(folder).items():
        kind, _, name = place.partition(".")
        like: Tensor | None = None
        if kind == "average":
            like = by_name.get(name)
        elif kind == "optimizer":
            number, parameter, _ = name.split(".", 2)
            if int(number) >= len(in_order):
                continue
            like = in_order[int(number)][int(parameter)]
        if kind != "weights":
            dtype = stored.properties.dtype
            if like is not None and like.shape == stored.size:
                tensors[place] = torch.empty_like(like, dtype=dtype)
            else:
                tensors[place] = torch.empty(stored.size, dtype=dtype)
    with torch.no_grad():
        read_into(folder, tensors)
    checkpoint = put_together({n: t for n, t in tensors.items() if n not in weights}, read_rest(folder))
    for optimizer, state in zip(optimizers, checkpoint["optimizer_states"], strict=False):
        optimizer.load_state_dict(state)
    return checkpoint


def load_whole(checkpoint: dict[str, Any], module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Load what a checkpoint file holds, each process its own parts; the average becomes parts too."""
    with torch.no_grad():
        for name, own in module.state_dict().items():
            own.copy_(spread_like(checkpoint["state_dict"][name], own))
    for optimizer, state in zip(optimizers, checkpoint.get("optimizer_states", []), strict=False):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        values = {
            number: {
                key: spread_like(value, parameters[number])
                if isinstance(value, Tensor) and value.shape == parameters[number].shape
                else value
                for key, value in own.items()
            }
            for number, own in state["state"].items()
        }
        optimizer.load_state_dict({"state": values, "param_groups": state["param_groups"]})
    if AVERAGE in checkpoint:
        like = dict(module.named_parameters())
        average = checkpoint[AVERAGE]
        spread = {n: spread_like(v, like[n]) for n, v in average["weights"].items() if n in like}
        checkpoint[AVERAGE] = average | {"weights": average["weights"] | spread}
