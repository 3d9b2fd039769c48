"""Muon for matrices and AdamW for all else, as one optimiser to the trainer and to its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch.optim import AdamW, Muon, Optimizer

OWN = "muon"  # key of a parameter group: whether Muon, rather than AdamW, steps it


class MuonAdamW(Optimizer):
    """torch's Muon (Jordan et al. 2024) for two-dimensional parameters that are no embeddings, AdamW for the
    others: biases, norms, embeddings, convolutions.

    Both share `lr`, which `adjust_lr` match_rms_adamw makes meaningful (Liu et al. 2025): Muon's updates get
    the size of AdamW's. The two optimisers step this one's groups and keep their state in this one's.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float = 3e-4,
        weight_decay: float = 1e-2,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        split = [part for group in params for part in by_shape(group)]
        self.parts: dict[bool, Optimizer] = {}
        if matrices := [group for group in split if group[OWN]]:
            self.parts[True] = Muon(
                matrices,
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                nesterov=nesterov,
                ns_steps=ns_steps,
                adjust_lr_fn=adjust_lr,
            )
        if others := [group for group in split if not group[OWN]]:
            self.parts[False] = AdamW(
                others, lr=lr, weight_decay=weight_decay, betas=(betas[0], betas[1]), eps=eps
            )
        super().__init__(
            [g for part in self.parts.values() for g in part.param_groups],
            {"lr": lr, "weight_decay": weight_decay},
        )
        self.share()

    def share(self) -> None:
        """Let the two optimisers step this one's groups, with this one's state."""
        for own, part in self.parts.items():
            part.param_groups = [group for group in self.param_groups if group[OWN] is own]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # makes new groups and a new state
        self.share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts.values():
            part.step()
        return loss


def by_shape(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A parameter group as one of matrices and one of the rest, without empty ones. A group that weight decay
    spares (`decays` False) has no matrices but embeddings."""
    wanted: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for parameter in group["params"]:
        wanted[parameter.ndim == 2 and group.get("decays", True)].append(parameter)
    return [group | {"params": params, OWN: own} for own, params in wanted.items() if params]
