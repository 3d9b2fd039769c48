"""Layers with weights of their own for every kind of robot (GR00T N1, Bjorck et al. 2025, section 2.1).

State and action vectors of different robots mean different things, so each robot has a slot of weights; what
lies between encoder and decoder is shared. One batch can hold samples of several robots.
"""

from __future__ import annotations

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from librobot.nn.steps import step_embedding

Slots = Int[Tensor, " b"] | int
"""Each sample's slot, or the one slot of all: its weights then need not be repeated for every sample."""


class EmbodimentLinear(nn.Module):
    """A linear map for each of `num_slots` robots. `weight` is (slots, in, out): its inputs are multiplied
    from the left, unlike torch's `Linear`."""

    def __init__(self, num_slots: int, in_width: int, out_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(num_slots, in_width, out_width))
        self.bias = nn.Parameter(torch.zeros(num_slots, out_width))

    def forward(self, x: Float[Tensor, "b l c"], slots: Slots) -> Float[Tensor, "b l d"]:
        x, weight, bias = x.to(self.weight.dtype), self.weight[slots], self.bias[slots]
        return x @ weight + bias if isinstance(slots, int) else torch.baddbmm(bias[:, None], x, weight)


class EmbodimentMLP(nn.Module):
    """Two such maps with a ReLU between them: GR00T's state encoder and action decoder."""

    def __init__(self, num_slots: int, in_width: int, hidden: int, out_width: int) -> None:
        super().__init__()
        self.enter = EmbodimentLinear(num_slots, in_width, hidden)
        self.leave = EmbodimentLinear(num_slots, hidden, out_width)

    def forward(self, x: Float[Tensor, "b l c"], slots: Slots) -> Float[Tensor, "b l d"]:
        return self.leave(functional.relu(self.enter(x, slots)), slots)


class EmbodimentActionEncoder(nn.Module):
    """Noisy actions and their time as tokens: W3 swish(W2 [W1 a, sincos(step)]), W1 to W3 per robot."""

    def __init__(self, num_slots: int, action_width: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.action = EmbodimentLinear(num_slots, action_width, width)
        self.mix = EmbodimentLinear(num_slots, 2 * width, width)
        self.leave = EmbodimentLinear(num_slots, width, width)

    def forward(
        self, actions: Float[Tensor, "b k a"], step: Int[Tensor, " b"], slots: Slots
    ) -> Float[Tensor, "b k d"]:
        embedded = self.action(actions, slots)
        time = repeat(step_embedding(step, self.width).to(embedded), "b d -> b k d", k=actions.shape[1])
        mixed = functional.silu(self.mix(torch.cat((embedded, time), dim=-1), slots))
        return self.leave(mixed, slots)
