"""The contract of an action head: an objective and a sampler over any network.

The framework brings the network, given an observation's context; the head brings what the network is trained
to predict and how actions are drawn from it. That is why `framework=pi0 head=ddpm` means something. Networks
come in two kinds, and a head says which it needs (`network`):

    denoiser  (x_t, time, context) -> (b, k, o): all actions of a chunk at once; `o` is the head's
              `output_width`, the action dimensions for most heads
    decoder   a causal network over tokens, one after another: see `Decoder`
    pair      a mapping with one of each, {"denoiser": ..., "decoder": ...}

Conventions that every head follows
    time  is in [0, 1]; 1 is pure noise and 0 is data (openpi's direction, the reverse of the pi0 paper's).
    noise is standard normal, of the actions' shape.
    mask  is True where a step (b, k) or an element (b, k, a) counts. What it hides never changes the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from librobot import replicas
from librobot.losses import Mask

NetworkKind = Literal["denoiser", "decoder", "pair"]


class Denoiser(Protocol):
    """The network as most heads see it. `context` is the framework's own and is passed on untouched."""

    def __call__(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], context: Any, /
    ) -> Float[Tensor, "b k o"]: ...


class DecoderState(Protocol):
    """Decoding under way: give the tokens just chosen (None at first), get the logits of the next ones."""

    def __call__(self, tokens: Int[Tensor, " b"] | None, /) -> Float[Tensor, "b v"]: ...


class Decoder(Protocol):
    """The network of a head that predicts tokens one after another.

    It may have `of_real(tokens, real, context)`: the logits (n, v) of the real tokens alone, sample by
    sample, where `real` (b, l) holds a run from each sample's first token on.
    """

    def __call__(self, tokens: Int[Tensor, "b l"], context: Any, /) -> Float[Tensor, "b l v"]:
        """Logits of every token from the tokens before it (the first from the context alone)."""
        ...

    def begin(self, context: Any, /) -> DecoderState:
        """Start decoding; gives the same logits as the call above, without computing anything twice."""
        ...


class Droppable(Protocol):
    """A context that classifier-free guidance can hide."""

    def dropped(self, rows: Bool[Tensor, " b"], /) -> Droppable:
        """The context with the observation hidden from those samples."""
        ...


class ActionHead(nn.Module):
    """Base of all heads.

    `generative` says whether the denoiser's input carries noise and time, `stochastic` whether `sample`
    reads `noise`. Randomness is an argument: it is drawn from torch's generator only where it is None.

    `dim_weights` weights the loss of each action dimension (None: all alike); a sample's loss is the weighted
    mean. `drop_context` is the share of training samples whose context is hidden from the network, for
    classifier-free guidance (Ho and Salimans 2022).
    """

    network: ClassVar[NetworkKind] = "denoiser"
    generative: ClassVar[bool]
    anchor: Tensor
    dim_weights: Tensor | None

    def __init__(self, *, dim_weights: Sequence[float] | None = None, drop_context: float = 0.0) -> None:
        super().__init__()
        # Follows the module's device and dtype, so that noise is drawn where the network lives.
        self.register_buffer("anchor", torch.empty(0), persistent=False)
        if not 0.0 <= drop_context < 1.0:
            raise ValueError(f"drop_context must be at least 0 and below 1, found {drop_context}")
        if dim_weights is not None and (not len(dim_weights) or min(dim_weights) <= 0):
            raise ValueError(f"dim_weights must be positive numbers, found {list(dim_weights)}")
        self.drop_context = drop_context
        weights = None if dim_weights is None else torch.tensor(dim_weights, dtype=torch.float32)
        self.register_buffer("dim_weights", weights, persistent=False)

    @property
    def stochastic(self) -> bool:
        return self.generative

    def attach(self, *, horizon: int, action_dim: int, real_dim: int | None = None) -> None:
        """Learn the chunk's shape (k, a), before anything else is called; a framework does this once.

        `real_dim` is the number of dimensions before the framework pads them; None where it does not.
        Raises ValueError where the head cannot do that shape.
        """
        self.horizon, self.action_dim = horizon, action_dim
        real = action_dim if real_dim is None else real_dim
        if self.dim_weights is not None:
            if len(self.dim_weights) != real:
                raise ValueError(
                    f"dim_weights must hold one weight for each of {real} action dimensions, "
                    f"found {len(self.dim_weights)}"
                )
            padding = self.dim_weights.new_ones(action_dim - real)
            self.dim_weights = torch.cat((self.dim_weights, padding))

    @property
    def output_width(self) -> int:
        """The numbers that the denoiser returns for each action of a chunk."""
        return self.action_dim

    @property
    def needs_fit(self) -> bool:
        """Whether `fit` has still to be called before training, as for tokens that data define."""
        return False

    def fit(self, actions: Float[Tensor, "n k a"]) -> None:
        """Learn from normalised chunks what is not learned by gradient. Once, before training."""

    def files(self) -> dict[str, str]:
        """Name -> text of what a checkpoint has to hold beside weights to restore what `fit` learned."""
        return {}

    def restore(self, files: Mapping[str, str]) -> None:
        """The reverse of `files`."""

    def loss(
        self,
        network: Any,
        context: Any,
        actions: Float[Tensor, "b k a"],
        mask: Mask,
        *,
        noise: Float[Tensor, "b k a"] | None = None,
        time: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, " b"]:
        """The objective of each sample: the mean over the elements that `mask` admits (0 where none is)."""
        raise NotImplementedError

    def sample(
        self,
        network: Any,
        context: Any,
        shape: tuple[int, int, int],
        *,
        noise: Float[Tensor, "*steps b k a"] | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
    ) -> Float[Tensor, "b k a"]:
        """Draw normalised actions of `shape` (b, k, a).

        `num_steps` is the number of sampling steps; heads that have none ignore it. `guidance` above 1
        pushes samples away from what the network predicts without the context; it needs a network trained
        with `drop_context`.
        """
        raise NotImplementedError

    # What heads share.

    def draw_noise(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=self.anchor.device, dtype=self.anchor.dtype)

    def training_context(self, context: Any, count: int) -> Any:
        """The context with `drop_context` of the samples hidden."""
        if not self.drop_context:
            return context
        device = self.anchor.device
        rows = replicas.draw(lambda n: torch.rand(n, device=device), count) < self.drop_context
        return self._droppable(context).dropped(rows)

    def guided(self, denoiser: Denoiser, context: Any, count: int, guidance: float | None) -> Denoiser:
        """The denoiser itself, or its extrapolation u + guidance * (c - u) away from the unconditional u."""
        if guidance is None or guidance == 1.0:
            return denoiser
        if not self.drop_context:
            raise ValueError(
                f"{type(self).__name__}: guidance={guidance:g} needs a network that was trained with "
                f"drop_context above 0, found 0; train with head.drop_context=0.1"
            )
        everyone = torch.ones(count, dtype=torch.bool, device=self.anchor.device)
        hidden = self._droppable(context).dropped(everyone)

        def extrapolated(x_t: Tensor, time: Tensor, context: Any, /) -> Tensor:
            without = denoiser(x_t, time, hidden)
            return without + guidance * (denoiser(x_t, time, context) - without)

        return extrapolated

    def no_guidance(self, guidance: float | None) -> None:
        """For heads without it: raises ValueError where some is asked for."""
        if guidance is not None and guidance != 1.0:
            raise ValueError(
                f"{type(self).__name__} has no guidance, found guidance={guidance:g}; leave it at 1"
            )

    @staticmethod
    def _droppable(context: Any) -> Droppable:
        if not hasattr(context, "dropped"):
            raise ValueError(
                "drop_context and guidance need a context that can be hidden, which this framework's cannot; "
                "take framework=pi0 or framework=custom, or leave head.drop_context at 0"
            )
        return context


def at_least_one(num_steps: int) -> int:
    """`num_steps` itself. Raises ValueError below 1."""
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, found {num_steps}")
    return num_steps


def further_noise(noise: Float[Tensor, "b k a"], number: int) -> Float[Tensor, "b k a"]:
    """Standard normal noise for a sampler's later steps (`number` 1, 2, ...) that `noise` determines.

    The far digits of noise's quantiles are as good as independent of the quantiles themselves; each number
    multiplies them by a factor of its own, so that they are of each other, too.
    """
    factor = 4099 + pow(48271, number, 1_048_573)
    digits = (torch.special.ndtr(noise.double()) * factor) % 1.0
    return torch.special.ndtri(digits.clamp(1e-9, 1 - 1e-9)).float()


def hold_last(actions: Float[Tensor, "b k a"], mask: Mask) -> Float[Tensor, "b k a"]:
    """Replace hidden elements by the last admitted one before them, or else by the first one (0 where there
    is none).

    A generative objective shows the noisy chunk to the network, which mixes its steps: without this, what
    stands past an episode's end would reach the loss of the steps before it. Holding the last action is also
    what a robot does there.
    """
    visible = (mask.unsqueeze(-1) if mask.ndim == 2 else mask).expand_as(actions)
    step = torch.arange(actions.shape[1], device=actions.device)[None, :, None]
    source, _ = torch.where(visible, step, -1).cummax(dim=1)
    first = visible.to(torch.uint8).argmax(dim=1, keepdim=True)
    held = actions.gather(1, torch.where(source < 0, first, source))
    return held.masked_fill(~visible.any(dim=1, keepdim=True), 0.0)
