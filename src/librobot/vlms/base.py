"""What a vision-language backbone gives to a framework, and what a framework may ask of it.

A backbone knows nothing of actions or of Lightning. It reads an `Observation` and returns a `Context`: hidden
states, and every layer's keys and values. Prefix tokens (images, instruction) never see action tokens, so a
`Context` computed once is exact for every sampling step that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

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
    arbitrary values and must not be attended to. `keys` are stored after the rotary embedding.
    """

    hidden: Float[Tensor, "b l d"]
    layers: tuple[Float[Tensor, "b l d"], ...]
    keys: tuple[Float[Tensor, "b h l e"], ...]
    values: tuple[Float[Tensor, "b h l e"], ...]
    mask: Bool[Tensor, "b l"]
    next_position: Int[Tensor, " b"]


class Processor(Protocol):
    """Turns prompts (and, for backbones that need it, images) into tensors whose first axis is the batch.

    It is called in data workers, so it must be picklable and light: no weights, no CUDA. What it returns
    becomes `Observation.inputs`. A prompt that is too long is an error, never cut in silence.
    """

    def __call__(self, prompts: list[str], images: dict[str, Tensor] | None = None) -> dict[str, Tensor]: ...


@dataclass
class OrderedProcessor:
    """A processor that takes the pictures in a robot's order of cameras, whatever order they come in."""

    processor: Processor
    camera_names: tuple[str, ...]

    def __call__(self, prompts: list[str], images: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        if images is not None:
            images = {name: images[name] for name in self.camera_names}
        return self.processor(prompts, images)


class VLM(nn.Module):
    """A backbone: a subclass sets the four attributes below and implements `forward`.

    `has_cache` False is an encoder whose context is hidden states alone (`keys` and `values` are empty): a
    denoiser projects its own (`librobot.nn.learned_cache`). `geometry` is then the encoder's.
    `blocks` are the repeated layers, for sharding, activation checkpointing and compilation. Cameras are
    taken in the order of the observation's dictionary; `Framework.prepare` puts them into the robot's own
    order.
    """

    hidden_size: int
    geometry: Geometry
    processor: Processor
    blocks: nn.ModuleList
    has_cache: bool = True

    def forward(self, observation: Observation, *, layers: Sequence[int] = (-1,)) -> Context:
        """Run the prefix. `observation.inputs` must hold what `processor` returned.

        `layers` names the hidden states to return: 0 is the embedded input, i is the output of block i, and
        the last (-1) also passes the final norm. With `layers=()` only keys and values are computed, and
        `Context.hidden` is the residual stream that enters the last block (without a cache: the last state).
        """
        raise NotImplementedError

    def files(self) -> dict[str, str]:
        """Name -> text of what a checkpoint has to hold, beside weights, to build this backbone again."""
        return {}

    def unused_parameters(self, layers: Sequence[int]) -> list[nn.Parameter]:
        """Parameters that cannot influence a `Context` of these `layers`, and so never get a gradient.

        A framework freezes them (`Framework.freeze_unused`): DistributedDataParallel waits for every
        trainable parameter's gradient, and an optimiser would only decay them.
        """
        return []
