"""Deep ensemble (Lakshminarayanan et al. 2017): networks that share nothing but their input."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from librobot.networks.base import ContextTokens, Network, NetworkFactory, Sizes


class DeepEnsemble(Network):
    """`num_members` denoisers with initial weights of their own, outputs side by side on the last axis."""

    kind: ClassVar[Literal["denoiser"]] = "denoiser"

    def __init__(self, *, sizes: Sizes, member: NetworkFactory, num_members: int = 5) -> None:
        super().__init__()
        if num_members < 1 or sizes.output_width % num_members:
            raise ValueError(
                f"num_members must divide the head's output width of {sizes.output_width}, found "
                f"{num_members}; take head=ensemble with head.num_members={num_members}"
            )
        own = replace(sizes, output_width=sizes.output_width // num_members)
        self.members = nn.ModuleList(member(sizes=own) for _ in range(num_members))
        wrong = next((x for x in self.members if x.kind != "denoiser"), None)
        if wrong is not None:
            raise ValueError(f"member must be a denoiser, found {type(wrong).__name__}, a {wrong.kind}")

    def forward(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], context: ContextTokens
    ) -> Float[Tensor, "b k o"]:
        return torch.cat([member(x_t, time, context) for member in self.members], dim=-1)
