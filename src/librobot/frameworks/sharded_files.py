"""Checkpoints that are folders: every process writes its part of the tensors (torch.distributed.checkpoint).

Beside the tensors the folder holds `rest.pt`, all that is not one. Both together are what a checkpoint file
holds, so that any number of processes reads them, one included, whatever number wrote them.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from librobot.checkpoint_path import REST, is_sharded
from librobot.errors import LibrobotError
from librobot.frameworks.checkpoint import AVERAGE


def take_apart(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint by name (`weights.NAME`, `optimizer.I.PARAMETER.KEY`, `average.NAME`), and
    all the rest of it."""
    rest = dict(checkpoint)
    tensors = {f"weights.{name}": value for name, value in rest.pop("state_dict").items()}
    left = []
    for number, optimizer in enumerate(rest.pop("optimizer_states", [])):
        state: dict[Any, dict[str, Any]] = {}
        for parameter, own in optimizer["state"].items():
            state[parameter] = {}
            for key, value in own.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{number}.{parameter}.{key}"] = value
                else:
                    state[parameter][key] = value
        left.append({"state": state, "param_groups": optimizer["param_groups"]})
    rest["optimizer_states"] = left
    if AVERAGE in rest:
        tensors |= {f"average.{name}": value for name, value in rest[AVERAGE]["weights"].items()}
        rest[AVERAGE] = rest[AVERAGE] | {"weights": {}}
    return tensors, rest


def put_together(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint that `take_apart` took apart."""
    checkpoint: dict[str, Any] = {**rest, "state_dict": {}}
    for place, value in tensors.items():
        kind, _, name = place.partition(".")
        if kind == "weights":
            checkpoint["state_dict"][name] = value
        elif kind == "average":
            checkpoint[AVERAGE]["weights"][name] = value
        else:
            number, parameter, key = name.split(".", 2)
            checkpoint["optimizer_states"][int(number)]["state"][int(parameter)][key] = value
    return checkpoint


def shapes_of(folder: Path) -> dict[str, TensorStorageMetadata]:
    """What the folder says of its tensors. Raises LibrobotError where it is none of ours."""
    if not is_sharded(folder):
        raise LibrobotError(
            f"{folder}: expected a sharded checkpoint of librobot (.metadata and {REST}), found another "
            f"folder, or one that was not written to its end"
        )
    try:
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise LibrobotError(f"{folder}: the sharded checkpoint cannot be read: {error}") from error
    return {name: value for name, value in stored.items() if isinstance(value, TensorStorageMetadata)}


def read_rest(folder: Path) -> dict[str, Any]:
    return torch.load(folder / REST, map_location="cpu", weights_only=True)


def read_into(folder: Path, tensors: dict[str, Any], *, alone: bool = False) -> None:
    """Fill tensors, spread over processes or not, in place; `alone` says that there is no other process."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is meant
            dcp.load(tensors, storage_reader=FileSystemReader(folder), no_dist=alone)
    except Exception as error:
        raise LibrobotError(f"{folder}: the sharded checkpoint cannot be read: {error}") from error


def read_whole(folder: Path) -> dict[str, Any]:
    """All of the checkpoint in this process's memory, as a file would give it."""
    stored = shapes_of(folder)
    tensors = {name: torch.empty(v.size, dtype=v.properties.dtype) for name, v in stored.items()}
    read_into(folder, tensors, alone=True)
    return put_together(tensors, read_rest(folder))
