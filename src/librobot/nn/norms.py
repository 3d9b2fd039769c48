"""Norms that torch does not have."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class GemmaRMSNorm(nn.Module):
    """RMSNorm as Gemma writes it: the scale is stored as its difference from one, and starts at zero."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        scale = 1.0 + self.scale.float()
        return functional.rms_norm(x.float(), (x.shape[-1],), scale, self.eps).to(x.dtype)


class AdaptiveRMSNorm(nn.Module):
    """RMSNorm whose scale and shift follow a condition, and a gate for the branch behind it (pi0.5; openpi
    `gemma.py`, after the adaLN-Zero of Peebles and Xie 2023).

        scale, shift, gate = linear(condition)
        norm(x) * (1 + scale) + shift, gate

    The linear map starts at zero: at first the norm is a plain one and the gate shut. With `gate_bias` 1 the
    gate starts open. Without a condition (`condition_width` 0) it is Gemma's norm, and there is no gate.
    """

    def __init__(
        self, width: int, condition_width: int = 0, *, gate_bias: float = 0.0, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.eps = eps
        self.plain = None if condition_width else GemmaRMSNorm(width, eps)
        self.linear = nn.Linear(condition_width, 3 * width) if condition_width else None
        if self.linear is not None:
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
            nn.init.constant_(self.linear.bias[2 * width :], gate_bias)

    def forward(
        self, x: Float[Tensor, "b l d"], condition: Float[Tensor, "b e"] | None = None
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b 1 d"] | None]:
        """The normed `x`, and the gate: None where there is none."""
        if self.plain is not None:
            return self.plain(x), None
        assert self.linear is not None
        assert condition is not None
        scale, shift, gate = self.linear(condition)[:, None].chunk(3, dim=-1)
        normed = functional.rms_norm(x.float(), (x.shape[-1],), eps=self.eps)
        return torch.addcmul(shift.float(), normed, 1.0 + scale.float()).to(x.dtype), gate


def gated_sum(
    x: Float[Tensor, "b l d"], branch: Float[Tensor, "b l d"], gate: Float[Tensor, "b 1 d"] | None
) -> Float[Tensor, "b l d"]:
    """The residual sum x + gate * branch, or x + branch where there is no gate."""
    return x + branch if gate is None else torch.addcmul(x, gate, branch)
