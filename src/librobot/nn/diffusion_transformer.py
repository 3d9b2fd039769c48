"""Diffusion Policy's transformer (Chi et al. 2023, section III-B): causal over the chunk's steps."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from librobot.nn.positions import level_embedding


class DiffusionTransformer(nn.Module):
    """A pre-norm transformer decoder over one token per action.

        memory   MLP of [level, observation step 1, ..., observation step n], each with a learned position
        actions  see themselves and the actions before them, the level, and in the memory the observation
                 steps up to their own: the chunk begins at the first observation step

    `dropout` is that of the decoder's layers.
    """

    def __init__(
        self,
        *,
        horizon: int,
        channels_in: int,
        channels_out: int,
        condition_width: int,
        num_conditions: int,
        width: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.width = width
        self.action_in_proj = nn.Linear(channels_in, width)
        self.action_positions = nn.Parameter(torch.empty(1, horizon, width))
        self.condition_proj = nn.Linear(condition_width, width)
        self.condition_positions = nn.Parameter(torch.empty(1, 1 + num_conditions, width))
        self.condition_mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width)
        )
        layer = nn.TransformerDecoderLayer(
            width, num_heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, num_layers)
        self.norm = nn.LayerNorm(width)
        self.action_out_proj = nn.Linear(width, channels_out)
        self.register_buffer("hidden_actions", ~causal(horizon), persistent=False)
        self.register_buffer("hidden_memory", ~sees_memory(horizon, 1 + num_conditions), persistent=False)
        self._initialise()

    def forward(
        self,
        x_t: Float[Tensor, "b k a"],
        level: Float[Tensor, " b"],
        conditions: Float[Tensor, "b n f"],
    ) -> Float[Tensor, "b k o"]:
        """`level` counts levels of noise: see `level_embedding`."""
        embedded = level_embedding(level, self.width).to(conditions)[:, None]
        memory = torch.cat((embedded, self.condition_proj(conditions)), dim=1) + self.condition_positions
        x = self.action_in_proj(x_t) + self.action_positions
        x = self.decoder(
            x, self.condition_mlp(memory), tgt_mask=self.hidden_actions, memory_mask=self.hidden_memory
        )
        return self.action_out_proj(self.norm(x))

    def _initialise(self) -> None:
        """Weights and positions from N(0, 0.02^2), biases zero, as GPT-2's."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


def causal(horizon: int) -> Bool[Tensor, "k k"]:
    """An action sees itself and those before it."""
    return torch.ones(horizon, horizon, dtype=torch.bool).tril()


def sees_memory(horizon: int, num_memory: int) -> Bool[Tensor, "k m"]:
    """Action i sees the level (memory token 0), and observation step j (token 1 + j) where j <= i."""
    return torch.ones(horizon, num_memory, dtype=torch.bool).tril(diagonal=1)
