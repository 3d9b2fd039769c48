"""The robot's state as tokens (`state_encoder=`).

An encoder is built as `Encoder(state_dim=, obs_steps=, width=, ...)` and called with the normalised state
(b, t, s). It returns (b, num_tokens, width), older steps first, each step's tokens marked by its age.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.ops import MLP

from librobot.nn.positions import age_embedding
from librobot.nn.vector_quantizer import VectorQuantizer


class StateEncoder(nn.Module):
    """Base of all. `num_tokens` is how many tokens `forward` returns. An encoder that has an objective of its
    own, beside the policy's, gives it as `auxiliary_loss()`."""

    ages: Tensor

    def __init__(self, *, state_dim: int, obs_steps: int, width: int, tokens_per_step: int) -> None:
        super().__init__()
        if state_dim < 1:
            raise ValueError(
                f"state_dim must be at least 1, found {state_dim}; a robot without state needs no encoder"
            )
        self.num_tokens = obs_steps * tokens_per_step
        self.register_buffer("ages", age_embedding(obs_steps, width), persistent=False)

    def forward(self, state: Float[Tensor, "b t s"]) -> Float[Tensor, "b n d"]:
        raise NotImplementedError


class MLPState(StateEncoder):
    """One token per step: `num_layers` linear layers with GELU between them. One is pi0's projection."""

    def __init__(
        self, *, state_dim: int, obs_steps: int, width: int, num_layers: int = 2, mlp_width: int = 256
    ) -> None:
        super().__init__(state_dim=state_dim, obs_steps=obs_steps, width=width, tokens_per_step=1)
        self.network = mlp(state_dim, width, num_layers=num_layers, mlp_width=mlp_width)

    def forward(self, state: Float[Tensor, "b t s"]) -> Float[Tensor, "b t d"]:
        return self.network(state) + self.ages


class TransformerState(StateEncoder):
    """One token per dimension and step, mixed by a transformer encoder.

    A dimension's token is value * weight + bias with a weight and a bias of its own (the feature tokenizer of
    FT-Transformer, Gorishniy et al. 2021, section 3.3). `pool` returns the mean of each step's tokens, one
    token per step. The transformer's width is `inner_width`.
    """

    def __init__(
        self,
        *,
        state_dim: int,
        obs_steps: int,
        width: int,
        inner_width: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        mlp_width: int = 256,
        dropout: float = 0.0,
        pool: bool = False,
    ) -> None:
        # The base's width is the inner one: ages are added where the transformer can read them.
        per_step = 1 if pool else state_dim
        super().__init__(
            state_dim=state_dim, obs_steps=obs_steps, width=inner_width, tokens_per_step=per_step
        )
        if num_heads < 1 or inner_width % num_heads:
            raise ValueError(f"num_heads must divide inner_width={inner_width}, found {num_heads}")
        self.pool = pool
        self.weight = nn.Parameter(torch.randn(state_dim, inner_width) * 0.5)
        self.bias = nn.Parameter(torch.randn(state_dim, inner_width) * 0.5)
        layer = nn.TransformerEncoderLayer(
            inner_width,
            num_heads,
            mlp_width,
            dropout=dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(
            layer, num_layers, norm=nn.LayerNorm(inner_width), enable_nested_tensor=False
        )
        self.project = nn.Linear(inner_width, width)

    def forward(self, state: Float[Tensor, "b t s"]) -> Float[Tensor, "b n d"]:
        tokens = state[..., None] * self.weight + self.bias + self.ages[:, None]
        tokens = self.encoder(rearrange(tokens, "b t s d -> b (t s) d"))
        if self.pool:
            tokens = rearrange(tokens, "b (t s) d -> b t s d", t=state.shape[1]).mean(dim=2)
        return self.project(tokens)


class TokenState(StateEncoder):
    """One token per dimension and step: the value's bin, looked up in the dimension's own table.

    `num_bins` equal bins cover [low, high] in normalised units, and what lies outside falls into the first or
    the last. pi0.5 writes its state so (Physical Intelligence 2025), and RT-2 its actions (Brohan et al.
    2023), with 256 bins over the data's range: [-1, 1] under min_max or quantile. The default fits mean_std.
    Values within a bin are not told apart, and no gradient reaches the state.
    """

    def __init__(
        self,
        *,
        state_dim: int,
        obs_steps: int,
        width: int,
        num_bins: int = 256,
        low: float = -3.0,
        high: float = 3.0,
    ) -> None:
        super().__init__(state_dim=state_dim, obs_steps=obs_steps, width=width, tokens_per_step=state_dim)
        if num_bins < 2:
            raise ValueError(f"num_bins must be at least 2, found {num_bins}")
        if not low < high:
            raise ValueError(f"low must be below high, found {low} and {high}")
        self.state_dim, self.num_bins = state_dim, num_bins
        self.low, self.high = low, high
        self.table = nn.Embedding(state_dim * num_bins, width)
        nn.init.normal_(self.table.weight, std=0.5)

    def bins(self, state: Float[Tensor, "b t s"]) -> Int[Tensor, "b t s"]:
        """The number of each value's bin, in 0 .. num_bins - 1."""
        place = (state.float() - self.low) / (self.high - self.low)
        return (place * self.num_bins).floor().clamp(0, self.num_bins - 1).long()

    def forward(self, state: Float[Tensor, "b t s"]) -> Float[Tensor, "b n d"]:
        first_row = torch.arange(self.state_dim, device=state.device) * self.num_bins
        tokens = self.table(self.bins(state) + first_row) + self.ages[:, None]
        return rearrange(tokens, "b t s d -> b (t s) d")


class VQState(StateEncoder):
    """One token per step: the nearest of `num_codes` learned states (van den Oord et al. 2017).

    The state is mapped to `code_width` numbers, quantised, and mapped to the width. `auxiliary_loss` has to
    join the training loss: without it no code moves.
    """

    def __init__(
        self,
        *,
        state_dim: int,
        obs_steps: int,
        width: int,
        num_codes: int = 512,
        code_width: int = 8,
        commitment: float = 0.25,
        num_layers: int = 2,
        mlp_width: int = 256,
    ) -> None:
        super().__init__(state_dim=state_dim, obs_steps=obs_steps, width=width, tokens_per_step=1)
        self.encoder = mlp(state_dim, code_width, num_layers=num_layers, mlp_width=mlp_width)
        self.quantizer = VectorQuantizer(num_codes, code_width, commitment=commitment)
        self.project = nn.Linear(code_width, width)
        self._loss: Tensor | None = None

    def forward(self, state: Float[Tensor, "b t s"]) -> Float[Tensor, "b t d"]:
        quantized = self.quantizer(self.encoder(state))
        self._loss = quantized.loss
        return self.project(quantized.values) + self.ages

    def auxiliary_loss(self) -> Float[Tensor, ""]:
        """The codebook and commitment loss of the last `forward` (0 before the first)."""
        return self.ages.new_zeros(()) if self._loss is None else self._loss


def mlp(state_dim: int, width: int, *, num_layers: int, mlp_width: int) -> MLP:
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, found {num_layers}")
    return MLP(state_dim, [mlp_width] * (num_layers - 1) + [width], activation_layer=nn.GELU, inplace=None)
