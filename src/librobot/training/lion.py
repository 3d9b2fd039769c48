"""Lion (Chen et al. 2023, algorithm 2), which torch does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class Lion(Optimizer):
    """theta <- theta - lr (sign(b1 m + (1 - b1) g) + weight_decay theta), then m <- b2 m + (1 - b2) g."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float = 3e-5,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-3,
    ) -> None:
        if lr < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr and weight_decay must not be negative and betas must lie in [0, 1), found lr={lr}, "
                f"weight_decay={weight_decay}, betas={tuple(betas)}"
            )
        super().__init__(params, {"lr": lr, "betas": (betas[0], betas[1]), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, (b1, b2), weight_decay = group["lr"], group["betas"], group["weight_decay"]
            thetas = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not thetas:
                continue
            gradients = [parameter.grad for parameter in thetas]
            for parameter in thetas:
                if not self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            momenta = [self.state[parameter]["momentum"] for parameter in thetas]
            updates = torch._foreach_lerp(gradients, momenta, b1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(thetas, 1.0 - lr * weight_decay)
            torch._foreach_add_(thetas, updates, alpha=-lr)
            torch._foreach_lerp_(momenta, gradients, 1.0 - b2)
        return loss
