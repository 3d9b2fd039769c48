"""What several observation steps become for the policy (`history=`).

An encoder is built as `Encoder(width=, obs_steps=, ...)` and called with the tokens of all steps, oldest
first (b, t, n, width). It returns (b, m, width), where m is a multiple of n and token i belongs to place
i % n of a step. Places never mix here, so what a mask hides in one place stays out of the others.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from librobot.nn.alibi import alibi_bias
from librobot.nn.cross_attention import CrossAttentionBlock
from librobot.nn.masks import attention_sinks, causal, sliding_window
from librobot.nn.positions import age_embedding

Positions = Literal["age", "alibi"]


class Concatenate(nn.Module):
    """Keeps all tokens of all steps (m = t * n), each marked by its step's age. Costs no parameters, but
    attention over t times as many tokens."""

    ages: Tensor

    def __init__(self, *, width: int, obs_steps: int) -> None:
        super().__init__()
        self.register_buffer("ages", age_embedding(obs_steps, width), persistent=False)

    def forward(self, tokens: Float[Tensor, "b t n d"]) -> Float[Tensor, "b m d"]:
        return rearrange(tokens + self.ages[:, None], "b t n d -> b (t n) d")


class Summary(nn.Module):
    """Base of the encoders that keep one token per place (m = n): the newest step's token, plus a linear map
    of what `summarise` says of that place's steps. The sum keeps a backbone's features as they are."""

    def __init__(self, *, width: int, inner_width: int) -> None:
        super().__init__()
        self.project = nn.Linear(inner_width, width)

    def summarise(self, x: Float[Tensor, "m t d"]) -> Float[Tensor, "m e"]:
        """One vector for each sequence of steps."""
        raise NotImplementedError

    def forward(self, tokens: Float[Tensor, "b t n d"]) -> Float[Tensor, "b n d"]:
        summary = self.summarise(rearrange(tokens, "b t n d -> (b n) t d"))
        return tokens[:, -1] + rearrange(self.project(summary), "(b n) d -> b n d", b=len(tokens))


class LSTM(Summary):
    """The last output of an LSTM over the steps (Hochreiter and Schmidhuber 1997)."""

    def __init__(self, *, width: int, obs_steps: int, inner_width: int = 256, num_layers: int = 1) -> None:
        super().__init__(width=width, inner_width=inner_width)
        self.lstm = nn.LSTM(width, inner_width, num_layers, batch_first=True)

    def summarise(self, x: Float[Tensor, "m t d"]) -> Float[Tensor, "m e"]:
        return self.lstm(x)[0][:, -1]


class TemporalConvolution(Summary):
    """The last output of a temporal convolutional network (Bai et al. 2018, section 3): residual blocks of
    causal convolutions, whose dilation doubles from block to block."""

    def __init__(
        self,
        *,
        width: int,
        obs_steps: int,
        inner_width: int = 256,
        num_blocks: int = 3,
        kernel_size: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(width=width, inner_width=inner_width)
        reach = 1 + 2 * (kernel_size - 1) * (2**num_blocks - 1)
        if reach < obs_steps:
            raise ValueError(
                f"num_blocks={num_blocks} and kernel_size={kernel_size} reach back {reach} steps, which must "
                f"be at least obs_steps={obs_steps}; take more blocks or a larger kernel"
            )
        self.blocks = nn.Sequential(
            *(
                ConvolutionBlock(inner_width if i else width, inner_width, kernel_size, 2**i, dropout)
                for i in range(num_blocks)
            )
        )

    def summarise(self, x: Float[Tensor, "m t d"]) -> Float[Tensor, "m e"]:
        return self.blocks(rearrange(x, "m t d -> m d t"))[..., -1]


class ConvolutionBlock(nn.Module):
    """relu(shortcut(x) + f(x)), f twice a causal convolution with weight norm, ReLU and dropout (Bai et al.
    2018, figure 1b). The shortcut is a 1 x 1 convolution where the widths differ."""

    def __init__(self, in_width: int, width: int, kernel_size: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.past = (kernel_size - 1) * dilation
        self.first = weight_norm(nn.Conv1d(in_width, width, kernel_size, dilation=dilation))
        self.second = weight_norm(nn.Conv1d(width, width, kernel_size, dilation=dilation))
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Identity() if in_width == width else nn.Conv1d(in_width, width, 1)

    def forward(self, x: Float[Tensor, "m c t"]) -> Float[Tensor, "m e t"]:
        y = x
        for convolution in (self.first, self.second):
            y = self.dropout(functional.relu(convolution(functional.pad(y, (self.past, 0)))))
        return functional.relu(self.shortcut(x) + y)


class Transformer(Summary):
    """The last output of a causal transformer over the steps.

    `positions`: `age` adds a fixed vector for each step's age, `alibi` makes attention fall off with it
    (Press et al. 2022). A layer looks back over `window` steps, its own included (None: all of them), and
    always at the first `num_sinks` (Xiao et al. 2024), which need a window.
    """

    bias: Tensor | None
    ages: Tensor | None
    mask: Bool[Tensor, "1 t t"]

    def __init__(
        self,
        *,
        width: int,
        obs_steps: int,
        inner_width: int = 256,
        num_layers: int = 2,
        num_heads: int = 4,
        mlp_width: int = 512,
        positions: Positions = "age",
        window: int | None = None,
        num_sinks: int = 0,
    ) -> None:
        super().__init__(width=width, inner_width=inner_width)
        if positions not in get_args(Positions):
            raise ValueError(f"positions must be one of {get_args(Positions)}, found {positions!r}")
        if num_sinks and window is None:
            raise ValueError(f"num_sinks={num_sinks} needs a window, found null; set window or leave it at 0")
        self.enter = nn.Linear(width, inner_width)
        self.layers = nn.ModuleList(
            CrossAttentionBlock(inner_width, num_heads, mlp_width) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(inner_width)
        step = torch.arange(obs_steps)[None]
        mask = causal(step, step)
        if window is not None:
            near = sliding_window(step, step, window)
            mask = mask & (near | attention_sinks(step, step, num_sinks) if num_sinks else near)
        with_bias = positions == "alibi"
        tables = {
            "mask": mask,
            "bias": alibi_bias(num_heads, step, step) if with_bias else None,
            "ages": None if with_bias else age_embedding(obs_steps, inner_width),
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def summarise(self, x: Float[Tensor, "m t d"]) -> Float[Tensor, "m e"]:
        x = self.enter(x)
        if self.ages is not None:
            x = x + self.ages
        for layer in self.layers:
            x = layer(x, x, mask=self.mask, bias=self.bias)
        return self.norm(x[:, -1])
