"""ACT's decoder as a network (Zhao et al. 2023; DETR, Carion et al. 2020): a query per action reads the
context."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from librobot.networks.base import ContextTokens, Network, Sizes
from librobot.networks.inputs import ContextTokenProjection, TimeMLP, check_horizon, project
from librobot.nn.detr import Decoder, LayerOptions


class DETRDecoder(Network):
    """Queries enter every layer as positions; the layers' input is zeros, or the noisy actions plus the time.

    Context tokens carry their own positions. Norms stand after each sum unless `pre_norm`.
    """

    kind: ClassVar[Literal["denoiser"]] = "denoiser"

    def __init__(
        self,
        *,
        sizes: Sizes,
        width: int = 512,
        num_layers: int = 7,
        num_heads: int = 8,
        feedforward_width: int = 3200,
        dropout: float = 0.1,
        activation: str = "relu",
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(
                f"num_layers must be at least 1, found {num_layers}; queries must see the context"
            )
        self.queries = nn.Embedding(sizes.horizon, width)
        self.context_proj = ContextTokenProjection(sizes, width)
        self.decoder = Decoder(
            num_layers, LayerOptions(width, num_heads, feedforward_width, dropout, activation, pre_norm)
        )
        for parameter in self.decoder.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        self.time_mlp = self.action_proj = None
        if sizes.takes_noise:
            self.time_mlp = TimeMLP(width)
            self.action_proj = nn.Linear(sizes.action_dim, width)
        self.output_proj = nn.Linear(width, sizes.output_width)

    def forward(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], context: ContextTokens
    ) -> Float[Tensor, "b k o"]:
        check_horizon(x_t, self.queries.num_embeddings)
        memory = self.context_proj(context)
        if self.time_mlp is None or self.action_proj is None:
            x = memory.new_zeros(len(x_t), self.queries.num_embeddings, memory.shape[-1])
        else:
            x = project(self.action_proj, x_t) + self.time_mlp(time)[:, None]
        x = self.decoder(x, self.queries.weight, memory, torch.zeros_like(memory[:1]), context.mask)
        return self.output_proj(x)
