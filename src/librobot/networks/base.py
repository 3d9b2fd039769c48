"""The networks that a framework can be given (`network=`): what they read, and what they are built from.

A denoiser predicts all actions of a chunk at once, a decoder predicts tokens one after another; both read
the same context, a sequence of tokens. See `librobot.heads.base` for the two protocols.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

OPTION_OF = {"denoiser": "dit", "decoder": "causal", "pair": "pair"}
"""Kind of network -> the `network=` option that error messages recommend."""


@dataclass(frozen=True)
class Sizes:
    """What a network has to fit. `output_width` is the numbers per action that the head wants of a denoiser,
    `vocabulary` and `max_tokens` what it wants of a decoder (0 for heads without tokens). `takes_noise` is
    False for heads whose denoiser gets no noisy actions and no time."""

    horizon: int
    action_dim: int
    context_width: int
    output_width: int
    takes_noise: bool
    vocabulary: int = 0
    max_tokens: int = 0

    @classmethod
    def of(cls, head: Any, context_width: int) -> Sizes:
        """What an action head (`librobot.heads.base.ActionHead`) wants, once it is attached."""
        return cls(
            horizon=head.horizon,
            action_dim=head.action_dim,
            context_width=context_width,
            output_width=0 if head.network == "decoder" else head.output_width,
            takes_noise=head.generative,
            vocabulary=getattr(head, "vocabulary", 0),
            max_tokens=getattr(head, "max_tokens", 0),
        )


@dataclass
class ContextTokens:
    """What networks attend to. `mask` is True on real tokens; the first token of every sample is real.

    `features` are numbers that tell situations apart (`librobot.nn.pooling.situation`): optimal-transport
    coupling reads them. `null` stands for an observation that is hidden.
    """

    values: Float[Tensor, "b l d"]
    mask: Bool[Tensor, "b l"]
    features: Float[Tensor, "b f"]
    null: Float[Tensor, " d"]

    def dropped(self, rows: Bool[Tensor, " b"]) -> ContextTokens:
        """The context with the observation hidden from those samples: one null token is left."""
        values = torch.where(rows[:, None, None], self.null.to(self.values), self.values)
        first = torch.arange(self.mask.shape[1], device=self.mask.device) == 0
        return replace(self, values=values, mask=torch.where(rows[:, None], first, self.mask))

    def detach(self) -> ContextTokens:
        """The same numbers without a gradient to what made them (knowledge insulation)."""
        return replace(self, values=self.values.detach(), null=self.null.detach())


class Network(nn.Module):
    """Base of both kinds."""

    kind: ClassVar[Literal["denoiser", "decoder", "pair"]]


NetworkFactory = Callable[..., Network]
"""What a `network=` node makes: called with `sizes=Sizes(...)`."""
