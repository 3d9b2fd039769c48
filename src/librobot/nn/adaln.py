"""Adaptive layer norm (Peebles and Xie 2023, section 3.2): a condition scales, shifts and gates a branch.

scale, shift, gate = linear(silu(condition))
x + gate * branch(norm(x) * (1 + scale) + shift)
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class AdaLN(nn.Module):
    """What enters a branch, and the gate of what leaves it.

    The linear map starts at zero: at first the norm is a plain one, and a `gated` branch is shut (the paper's
    adaLN-Zero); `zero` False starts it at random numbers. Without a condition (`condition_width` 0) it is a
    layer norm with weights of its own, and the gate is open.
    """

    def __init__(
        self, width: int, condition_width: int, *, gated: bool = True, eps: float = 1e-6, zero: bool = True
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps, elementwise_affine=condition_width == 0)
        self.gated = gated
        self.linear: nn.Linear | None = None
        if condition_width:
            self.linear = nn.Linear(condition_width, (3 if gated else 2) * width)
            if zero:
                nn.init.zeros_(self.linear.weight)
                nn.init.zeros_(self.linear.bias)

    def forward(
        self, x: Float[Tensor, "b l d"], condition: Float[Tensor, "b e"] | None
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b 1 d"] | float]:
        """The normed `x`, and the gate: 1 where there is none."""
        if self.linear is None or condition is None:
            return self.norm(x), 1.0
        parts = self.linear(functional.silu(condition))[:, None].chunk(3 if self.gated else 2, dim=-1)
        return self.norm(x) * (1 + parts[0]) + parts[1], parts[2] if self.gated else 1.0
