"""A policy's weights over several processes: FSDP2 (Zhao et al. 2023) over one or two axes of a mesh, and
tensor parallelism (Shoeybi et al. 2019) of the blocks that declare how their matrices are split.

The mesh has the axes "replicate" (copies of the sharded policy), "shard" (its parts) and "tensor". Published
weights have stayed in their files (`librobot.nn.stored`), and each process reads its parts of them. All else
the first process has; the others were built without (`librobot.nn.pretrained.weightless`), and get their
parts of one parameter after the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from librobot.errors import LibrobotError, nearest
from librobot.nn.stored import StoredTensor

if TYPE_CHECKING:
    from librobot.frameworks.base import Framework

Split = Literal["column", "row"]
METHODS = (
    "keys_values",
    "read",
    "reads",
    "extend",
    "read_packed",
    "embed_tokens",
    "logits",
)  # of blocks and backbones, beside forward
ENTRIES = ("training_step", "validation_step", "sample_actions", "compute_loss")


def blocks_of(framework: Framework) -> dict[str, nn.Module]:
    """Every block that is wrapped on its own, by name: the backbone's, and those of the lists that the
    framework names in `block_lists`. Raises LibrobotError for a name that is not there."""
    found: dict[str, nn.Module] = {}
    if framework.vlm is not None:
        names = {module: name for name, module in framework.named_modules()}
        for block in framework.vlm.blocks:
            found[names[block]] = block
    for path in framework.block_lists:
        blocks = at(framework, path)
        if blocks is None:
            continue  # a part that this configuration has not
        for index, block in enumerate(blocks):
            found[f"{path}.{index}"] = block
    return found


def at(framework: Framework, path: str) -> Any:
    """The list of modules at a dotted path; None where a part on the way is None."""
    here: Any = framework
    for part in path.split("."):
        if here is None:
            return None
        if not hasattr(here, part):
            lists = [n for n, m in framework.named_modules() if isinstance(m, nn.ModuleList) and n]
            raise LibrobotError(
                f"framework {type(framework).__name__} declares the blocks {path!r} (block_lists), and has "
                f"no such part; {nearest(path, lists)}"
            )
        here = getattr(here, part)
    return here


def shard(framework: Framework, mesh: DeviceMesh, device: torch.device) -> None:
    """Spread the policy over `mesh`, in place; every process of the run has to call this.

    Raises LibrobotError for declared blocks that are not there, and heads that the tensor axis does not
    divide.
    """
    blocks = blocks_of(framework)
    if not blocks:
        raise LibrobotError(
            f"framework {type(framework).__name__} declares no blocks (block_lists), and sharding wraps "
            f"blocks; take trainer=ddp"
        )
    weights = strip(framework)
    tensor, whole = mesh["tensor"], mesh["replicate", "shard"]
    if tensor.size() > 1:
        split_blocks(framework, blocks, tensor)
    if whole.size() > 1 or tensor.size() == 1:
        axes = whole if mesh["replicate"].size() > 1 else mesh["shard"]
        wrap(framework, blocks, axes)
    ties = shared_places(framework)
    framework._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x.to(device))
    for first, *others in ties:  # which torch parts where the memory is new
        for module, name in others:
            module._parameters[name] = first[0]._parameters[first[1]]
    fill(framework, weights, device)
    if whole.size() > 1:
        for parameter in framework.parameters():
            if parameter.requires_grad and parameter.ndim == 0:  # which FSDP leaves alone
                parameter.register_post_accumulate_grad_hook(MeanOver(whole))


def strip(framework: Framework) -> dict[str, Tensor]:
    """Take the memory of all parameters, which stay shared where they were; what they held, by name. Buffers
    that are in a file are read."""
    weights = {name: parameter.data for name, parameter in framework.named_parameters()}
    made: dict[int, nn.Parameter] = {}
    for module in framework.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(
                    parameter.data.to("meta"), requires_grad=parameter.requires_grad
                )
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if isinstance(buffer, StoredTensor):
                module._buffers[name] = buffer.read()
    return weights


def shared_places(framework: Framework) -> list[list[tuple[nn.Module, str]]]:
    """The modules and names of each parameter that several modules share."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in framework.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return [found for found in places.values() if len(found) > 1]


def wrap(framework: Framework, blocks: dict[str, nn.Module], axes: DeviceMesh) -> None:
    """FSDP2: each block on its own, then the backbone where its dtype differs, then all that is left.

    A backbone's keys and values leave its blocks through a cache and not through their outputs, where FSDP
    would see that the backward pass begins; those blocks therefore stay whole between the two passes.
    """
    vlm = framework.vlm
    for block in blocks.values():
        cached = vlm is not None and vlm.has_cache and any(block is own for own in vlm.blocks)
        fully_shard(block, mesh=axes, reshard_after_forward=not cached)
    units: list[nn.Module] = list(blocks.values())
    if vlm is not None:
        vlm.stops_early = False  # a block that is left in its middle is never put together again
        own = {p.dtype for name, p in framework.named_parameters() if not name.startswith("vlm.")}
        if {p.dtype for p in vlm.parameters()} - own:
            fully_shard(vlm, mesh=axes, reshard_after_forward=False)
            units.append(vlm)
    scalars = {p for p in framework.parameters() if p.ndim == 0}
    fully_shard(framework, mesh=axes, reshard_after_forward=False, ignored_params=scalars)
    for unit in units:
        for method in METHODS:
            if hasattr(unit, method):
                register_fsdp_forward_method(unit, method)
    for method in ENTRIES:
        register_fsdp_forward_method(framework, method)


class MeanOver:
    """What brings a gradient to its mean over processes, for a parameter that each of them has."""

    def __init__(self, axes: DeviceMesh) -> None:
        self.axes = axes

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        for number in range(self.axes.ndim):
            dist.all_reduce(parameter.grad, group=self.axes.get_group(number))
        parameter.grad.div_(self.axes.size())


def split_blocks(framework: Framework, blocks: dict[str, nn.Module], tensor: DeviceMesh) -> None:
    """Tensor parallelism of the blocks that have a plan; the others are the same in all processes, with a
    warning that names them."""
    vlm, plain = framework.vlm, []
    for name, block in blocks.items():
        theirs = vlm is not None and any(block is own for own in vlm.blocks)
        owner = vlm if theirs and hasattr(vlm, "tensor_plan") else block
        plan: dict[str, Split] = getattr(owner, "tensor_plan", {})
        if not framework.splits_heads:
            plan = {} if any("q_proj" in part for part in plan) else plan
        if not plan:
            plain.append(name)
            continue
        check_divides(name, block, plan, tensor.size())
        styles = {"column": ColwiseParallel, "row": RowwiseParallel}
        parallelize_module(block, tensor, {part: styles[how]() for part, how in plan.items()})
    if len(plain) == len(blocks):
        raise LibrobotError(
            f"trainer=tp: no block of framework {type(framework).__name__} says how its matrices are split "
            f"(tensor_plan); take trainer=fsdp2"
        )
    if plain and dist.get_rank() == 0:
        warnings.warn(
            f"tensor parallelism: {len(plain)} of {len(blocks)} blocks have no plan (tensor_plan) and are "
            f"whole in every process: {', '.join(dict.fromkeys(name.rpartition('.')[0] for name in plain))}",
            stacklevel=2,
        )


def check_divides(name: str, block: nn.Module, plan: dict[str, Split], parts: int) -> None:
    """Heads, and the widths of what is split, must be multiples of the number of parts."""
    for attention in block.modules():
        for kind in ("num_heads", "num_kv_heads", "num_key_value_heads"):
            count = getattr(attention, kind, None) or getattr(getattr(attention, "config", None), kind, None)
            if isinstance(count, int) and count % parts and any("q_proj" in part for part in plan):
                raise LibrobotError(
                    f"trainer.strategy.tensor={parts} must divide {kind} of every block that is split, and "
                    f"{name} has {count}; take a divisor of it, or trainer=fsdp2"
                )
    for part, how in plan.items():
        linear: Any = block.get_submodule(part)
        width = linear.weight.shape[0 if how == "column" else 1]
        if width % parts:
            raise LibrobotError(
                f"trainer.strategy.tensor={parts} must divide the width of {name}.{part}, which is {width}"
            )


def fill(framework: Framework, weights: dict[str, Tensor], device: torch.device) -> None:
    """Each process reads its parts of what is in files that all of them have; the rest the first one hands
    out, one parameter at a time, and its own copies are freed on the way. Buffers become the first one's too.
    """
    everywhere = in_files_of_all(weights)
    with torch.no_grad():
        for name, parameter in framework.named_parameters():
            whole = weights.pop(name)
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if name in everywhere:
                assert isinstance(whole, StoredTensor)
                if local.numel():
                    local.copy_(whole.read(place_of(parameter)))
                continue
            whole = whole.read() if dist.get_rank() == 0 and isinstance(whole, StoredTensor) else whole
            whole = whole.to(device) if dist.get_rank() == 0 else empty_like(whole, device)
            whole = whole.contiguous()
            dist.broadcast(whole, src=0)
            local.copy_(own_part(whole, parameter))
        for buffer in framework.buffers():  # which may have been drawn at random
            same = buffer.contiguous()
            dist.broadcast(same, src=0)
            buffer.copy_(same)


def in_files_of_all(weights: dict[str, Tensor]) -> set[str]:
    """Names of the weights that every process finds in a file."""
    own = {name for name, value in weights.items() if isinstance(value, StoredTensor)}
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return set.intersection(*found)


def empty_like(whole: Tensor, device: torch.device) -> Tensor:
    return torch.empty(whole.shape, dtype=whole.dtype, device=device)


def place_of(like: Tensor) -> tuple[slice, ...] | None:
    """Which part of a whole tensor this process keeps, spread as `like` is; None for all of it."""
    if not isinstance(like, DTensor):
        return None
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """What this process keeps of a whole tensor that is spread as `like` is."""
    place = place_of(like)
    return whole if place is None else whole[place]


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over processes; every process has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor spread as `like` is: every process keeps its part."""
    if not isinstance(like, DTensor):
        return whole
    local = own_part(whole, like).to(like.device, copy=True).contiguous()
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def reshard(module: nn.Module) -> None:
    """Let every process hold its parts alone: after a forward pass without a backward one some are whole."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def clip_norm(parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
    """Scale all gradients so that their common norm is at most `largest`; the norm before.

    torch's own does not take tensors that are spread over different axes, as tensor parallelism has them.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares = [norm_of(group).square() for group in alike(gradients)]
    total = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
    factor = (largest / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.mul_(factor.to(local.device, local.dtype))
    return total


def scales_nothing(trainer: Trainer) -> bool:
    """Whether the precision is mixed and gradients are as they are (bf16-mixed): Lightning then refuses to
    clip what a fused kernel steps, as it has to where that kernel unscales them itself (16-mixed)."""
    plugin = trainer.precision_plugin
    return isinstance(plugin, MixedPrecision) and plugin.scaler is None


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of gradients that are spread alike."""
    return full(torch.nn.utils.get_total_norm(gradients))


def alike(tensors: Sequence[Any]) -> Iterator[list[Any]]:
    """The tensors in groups that are spread over the same mesh."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(mesh_of(tensor), []).append(tensor)
    yield from groups.values()


def mesh_of(tensor: Tensor) -> Any:
    """The mesh that a tensor is spread over, None where it is whole."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None
