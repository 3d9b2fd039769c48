"""Parameter groups for the optimiser: what decays, how much, and at which share of the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from librobot.errors import LibrobotError

if TYPE_CHECKING:
    from librobot.frameworks.base import Framework

Parts = Mapping[str, Sequence[tuple[str, nn.Parameter]]]


class ParameterGroups:
    """How a policy's parameters are grouped, the `param_groups=` group of the configuration.

    `weight_decays` maps parts (as `Framework.named_part` understands them) to a weight decay in place of the
    optimiser's; what weight decay spares at all (`undecayed`) stays spared. `layer_decay` below 1 gives the
    backbone's lower layers lower learning rates (`layer_multipliers`).
    """

    def __init__(self, weight_decays: Mapping[str, float] | None = None, layer_decay: float = 1.0) -> None:
        self.weight_decays = dict(weight_decays or {})
        for part, value in self.weight_decays.items():
            if value < 0:
                raise ValueError(
                    f"weight_decays: the weight decay of {part!r} must not be negative, found {value}"
                )
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], found {layer_decay}")
        self.layer_decay = layer_decay

    def __call__(self, framework: Framework, lr_multipliers: Mapping[str, float]) -> list[dict[str, Any]]:
        """The groups of a framework's trainable parameters; the two kinds of multiplier are multiplied."""
        multipliers = by_part({part: framework.named_part(part) for part in lr_multipliers}, lr_multipliers)
        if self.layer_decay < 1:
            if framework.vlm is None:
                raise LibrobotError(
                    f"param_groups.layer_decay is for a backbone's blocks, and "
                    f"this {type(framework).__name__} has none; set it to 1"
                )
            for identity, factor in layer_multipliers(
                framework.vlm, framework.vlm.blocks, self.layer_decay
            ).items():
                multipliers[identity] = multipliers.get(identity, 1.0) * factor
        decays = by_part(
            {part: framework.named_part(part) for part in self.weight_decays}, self.weight_decays
        )
        return parameter_groups(framework, multipliers, decays)


def undecayed(module: nn.Module) -> set[int]:
    """Identities of the parameters that weight decay spares: embeddings, and all vectors (norms, biases)."""
    spared = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters(False)}
    return spared | {id(p) for p in module.parameters() if p.ndim < 2}


def by_part(parts: Parts, values: Mapping[str, float]) -> dict[int, float]:
    """Each parameter's value, by identity; of overlapping parts the one named last counts."""
    return {id(p): float(values[part]) for part, named in parts.items() for _, p in named}


def layer_multipliers(backbone: nn.Module, blocks: nn.ModuleList, decay: float) -> dict[int, float]:
    """Layer-wise learning-rate decay (Bao et al. 2022, BEiT, appendix), by a parameter's identity.

    Of n blocks the last has `decay`, the first `decay`**n. What lies behind them beside the blocks (the final
    norm, an output layer) has 1, all else (embeddings, vision towers) `decay`**(n + 1).
    """
    n = len(blocks)
    names = {id(p): name for name, p in backbone.named_parameters()}
    depth = {id(p): n - index for index, block in enumerate(blocks) for p in block.parameters()}
    places = [index for index, identity in enumerate(names) if identity in depth]
    owner = next((name for name, module in backbone.named_modules() if module is blocks[0]), "")
    beside = owner.rpartition(".")[0].rpartition(".")[0]  # of model.layers.0 it is model
    for place, (identity, name) in enumerate(names.items()):
        behind = place > max(places) and name.startswith(f"{beside}." if beside else "")
        depth.setdefault(identity, 0 if behind else n + 1)
    return {identity: decay**exponent for identity, exponent in depth.items()}


def parameter_groups(
    module: nn.Module, multipliers: Mapping[int, float], weight_decays: Mapping[int, float]
) -> list[dict[str, Any]]:
    """Trainable parameters by what sets them apart; the arguments give a parameter's value by its identity.

    `lr_multiplier` in each group scales the optimiser's learning rate, `decays` says whether weight decay
    means it at all (and Muon, of matrices). Groups keep a fixed order, so that an optimiser's state resumes
    onto the same parameters.
    """
    spared = undecayed(module)
    groups: dict[tuple[bool, float | None, float], dict[str, Any]] = {}
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        identity = id(parameter)
        decays, multiplier = identity not in spared, multipliers.get(identity, 1.0)
        weight_decay = weight_decays.get(identity) if decays else 0.0
        key = (decays, weight_decay, multiplier)
        group = groups.setdefault(key, {"params": [], "lr_multiplier": multiplier, "decays": decays})
        if weight_decay is not None:
            group["weight_decay"] = weight_decay
        group["params"].append(parameter)
    return list(groups.values())
