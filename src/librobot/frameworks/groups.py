"""Parameter groups for the optimiser: what decays, and at which share of the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn


def undecayed(module: nn.Module) -> set[int]:
    """Identities of the parameters that weight decay spares: embeddings, and all vectors (norms, biases)."""
    spared = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters(False)}
    return spared | {id(p) for p in module.parameters() if p.ndim < 2}


def parameter_groups(
    module: nn.Module,
    parts: Mapping[str, Sequence[tuple[str, nn.Parameter]]],
    multipliers: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Trainable parameters by (decay, multiplier); of overlapping parts the one named last counts.

    `lr_multiplier` in each group scales the optimiser's learning rate. Groups keep a fixed order, so that an
    optimiser's state resumes onto the same parameters.
    """
    factor = {id(p): multipliers[part] for part, named in parts.items() for _, p in named}
    spared = undecayed(module)
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        decays, multiplier = id(parameter) not in spared, float(factor.get(id(parameter), 1.0))
        group = groups.setdefault((decays, multiplier), {"params": [], "lr_multiplier": multiplier})
        if not decays:
            group["weight_decay"] = 0.0
        group["params"].append(parameter)
    return list(groups.values())
