"""What a vision-language backbone gives to a framework, and what a framework may ask of it.

A backbone knows nothing of actions or of Lightning. It reads an `Observation` and returns a `Context`: hidden
states, and every layer's keys and values. Prefix tokens (images, instruction) never see action tokens, so a
`Context` computed once is exact for every sampling step that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from librobot.nn.masks import causal
from librobot.types import Observation


@dataclass(frozen=True)
class Geometry:
    """The shape of a backbone's attention: what an action expert must share to attend to its cache."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float


@dataclass
class Context:
    """What a backbone gives. `b` batch, `l` prefix tokens, `d` width, `h` key-value heads, `e` head size.

    `mask` is True where a prefix token is real (a present camera, a byte of the prompt); other tokens hold
    arbitrary values and must not be attended to. `keys` are stored after the rotary embedding. `pictures` is
    True on tokens that stand for pictures; None where that is not known.
    """

    hidden: Float[Tensor, "b l d"]
    layers: tuple[Float[Tensor, "b l d"], ...]
    keys: tuple[Float[Tensor, "b h l e"], ...]
    values: tuple[Float[Tensor, "b h l e"], ...]
    mask: Bool[Tensor, "b l"]
    next_position: Int[Tensor, " b"]
    pictures: Bool[Tensor, "b l"] | None = None


@dataclass(frozen=True)
class Vocabulary:
    """The language model's tokens, for a framework that writes with them.

    `size` is the number of `VLM.logits`. Ids below `num_text` are the tokenizer's own, from frequent to rare
    in every published one; special tokens and unused rows may follow. `begin` and `end` start and end a text,
    `space` is a word boundary. `tokenize` and `detokenize` know no special tokens.
    """

    size: int
    num_text: int
    begin: int | None
    end: int
    space: int
    tokenize: Callable[[str], list[int]]
    detokenize: Callable[[list[int]], str]


class Processor(Protocol):
    """Turns prompts (and, for backbones that need it, images) into tensors whose first axis is the batch.

    It is called in data workers, so it must be picklable and light: no weights, no CUDA. What it returns
    becomes `Observation.inputs`. A prompt that is too long is an error, never cut in silence.
    """

    def __call__(self, prompts: list[str], images: dict[str, Tensor] | None = None) -> dict[str, Tensor]: ...


class PromptWriter(Protocol):
    """Writes what a framework asks its backbone around the instruction, the state in words included:
    picklable and light, as it runs in data workers. `state` is (b, t, s) in physical units."""

    def __call__(self, prompts: list[str], state: Float[Tensor, "b t s"]) -> list[str]: ...


@dataclass
class ObservationProcessor:
    """A backbone's processor as a framework uses it: the pictures in a robot's order of cameras, whatever
    order they come in, and the prompts as the framework writes them (None: as they are)."""

    processor: Processor
    camera_names: tuple[str, ...]
    writer: PromptWriter | None = None

    def __call__(
        self, prompts: list[str], images: dict[str, Tensor], state: Float[Tensor, "b t s"]
    ) -> dict[str, Tensor]:
        if self.writer is not None:
            prompts = self.writer(prompts, state)
        return self.processor(prompts, {name: images[name] for name in self.camera_names})


class VLM(nn.Module):
    """A backbone: a subclass sets the four attributes below and implements `forward`.

    `has_cache` False is an encoder whose context is hidden states alone (`keys` and `values` are empty): a
    denoiser projects its own (`librobot.nn.learned_cache`). `geometry` is then the encoder's. `stops_early`
    says whether a pass may leave its last block in the middle; whoever wraps blocks sets it to False.
    `blocks` are the repeated layers, for sharding, activation checkpointing and compilation. Cameras are
    taken in the order of the observation's dictionary; `Framework.prepare` puts them into the robot's own
    order.
    """

    hidden_size: int
    geometry: Geometry
    processor: Processor
    blocks: nn.ModuleList
    has_cache: bool = True
    stops_early: bool = False

    def forward(self, observation: Observation, *, layers: Sequence[int] = (-1,)) -> Context:
        """Run the prefix. `observation.inputs` must hold what `processor` returned.

        `layers` names the hidden states to return: 0 is the embedded input, i is the output of block i, and
        the last (-1) also passes the final norm. With `layers=()` only keys and values are computed, and
        `Context.hidden` is the residual stream that enters the last block (without a cache: the last state).
        """
        raise NotImplementedError

    def prompts_as_written(self, max_tokens: int) -> Processor:
        """A processor for prompts that a framework writes to their end, of up to `max_tokens` tokens: it adds
        no line break of its own."""
        return self.processor

    @property
    def vocabulary(self) -> Vocabulary:
        """The language model's tokens. Raises LibrobotError where it cannot write (no cache)."""
        raise NotImplementedError

    def embed_tokens(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        """The language model's input embeddings of token ids, scaled as the model wants them."""
        raise NotImplementedError

    def extend(
        self,
        context: Context,
        x: Float[Tensor, "b q d"],
        *,
        sees: Bool[Tensor, "#b q q"] | None = None,
        real: Bool[Tensor, "b q"] | None = None,
    ) -> Context:
        """Run the language model over input embeddings `x` that follow `context`.

        Every new token sees the real tokens of the context. `sees[_, i, j]` says whether new token i sees new
        token j; None is causal, all True makes them see each other. `real` is False where a new token is
        padding: nobody sees it, and the tokens behind it take its position.

        The result's keys, values, mask and next position are those of context and new tokens together, so
        that it can be extended again; its `hidden` (after the final norm, if the backbone gives that) is that
        of the new tokens alone. Raises LibrobotError where the backbone has no cache.
        """
        raise NotImplementedError

    def read_packed(
        self,
        observation: Observation,
        x: Float[Tensor, "b q d"],
        real: Bool[Tensor, "b q"],
        *,
        length: int | None = None,
    ) -> Float[Tensor, "b m d"]:
        """`forward` and then a causal `extend` over `x`, in one pass over rows that hold several samples and
        no padding (`librobot.nn.packing`; `length` is that of a row).

        Returns the last hidden states (after the final norm) of each sample's last prefix token and of `x`
        (m = 1 + q); those that are not `real` are arbitrary. Only where `cannot_pack` is None.
        """
        raise NotImplementedError

    @property
    def cannot_pack(self) -> str | None:
        """Why rows cannot hold several samples; None where they can."""
        return f"{type(self).__name__} has no read_packed"

    def logits(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        """The language model's logits of the next token, from hidden states after the final norm."""
        raise NotImplementedError

    def files(self) -> dict[str, str]:
        """Name -> text of what a checkpoint has to hold, beside weights, to build this backbone again."""
        return {}

    def unused_parameters(self, layers: Sequence[int], *, logits: bool = False) -> list[nn.Parameter]:
        """Parameters that cannot influence a `Context` of these `layers` (nor, with `logits`, the language
        model's predictions), and so never get a gradient.

        A framework freezes them (`Framework.freeze_unused`): DistributedDataParallel waits for every
        trainable parameter's gradient, and an optimiser would only decay them.
        """
        return []


def extension(
    context: Context, num_new: int, sees: Bool[Tensor, "#b q q"] | None, real: Bool[Tensor, "b q"] | None
) -> tuple[Bool[Tensor, "b q m"], Int[Tensor, "b q"], Bool[Tensor, "b m"]]:
    """For tokens that follow `context`: who sees whom (queries are the new tokens, keys all of them), the new
    tokens' positions, and which of all tokens are real."""
    b, device = len(context.mask), context.mask.device
    if real is None:
        real = torch.ones(b, num_new, dtype=torch.bool, device=device)
    if sees is None:
        order = torch.arange(num_new, device=device)[None]
        sees = causal(order, order)
    itself = torch.eye(num_new, dtype=torch.bool, device=device)
    among = (sees & real[:, None, :]) | itself  # no row of a padding token is empty
    before = context.mask[:, None, :].expand(b, num_new, -1)
    positions = context.next_position[:, None] + real.long().cumsum(dim=1) - 1
    mask = torch.cat((before, among.expand(b, num_new, num_new)), dim=2)
    return mask, positions.clamp_min(0), torch.cat((context.mask, real), dim=1)
