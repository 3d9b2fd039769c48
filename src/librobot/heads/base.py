"""The contract of an action head: an objective and a sampler over any denoiser.

The framework brings the denoiser (its network, given an observation's context); the head brings what the
network is trained to predict and how actions are drawn from it. That is why `framework=pi0 head=ddpm` means
something.

Conventions that every head follows
    time  is in [0, 1]; 1 is pure noise and 0 is data (openpi's direction, the reverse of the pi0 paper's).
    noise is standard normal, of the actions' shape.
    mask  is True where a step (b, k) or an element (b, k, a) counts. What it hides never changes the loss.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

Mask = Bool[Tensor, "b k"] | Bool[Tensor, "b k a"]


class Denoiser(Protocol):
    """The network as a head sees it. `context` is the framework's own and is passed on untouched."""

    def __call__(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], context: Any, /
    ) -> Float[Tensor, "b k a"]: ...


class ActionHead(nn.Module):
    """Base of all heads. `generative` says whether the denoiser's input carries noise and time.

    Randomness is an argument: `noise` and `time` are drawn from torch's generator only where they are None.
    """

    generative: ClassVar[bool]
    anchor: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Follows the module's device and dtype, so that noise is drawn where the network lives.
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    def loss(
        self,
        denoiser: Denoiser,
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
        denoiser: Denoiser,
        context: Any,
        shape: tuple[int, int, int],
        *,
        noise: Float[Tensor, "*steps b k a"] | None = None,
        steps: int | None = None,
    ) -> Float[Tensor, "b k a"]:
        """Draw normalised actions of `shape` (b, k, a); `steps` is the number of denoiser calls."""
        raise NotImplementedError

    def draw_noise(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=self.anchor.device, dtype=self.anchor.dtype)


def hold_last(actions: Float[Tensor, "b k a"], mask: Mask) -> Float[Tensor, "b k a"]:
    """Replace hidden elements by the last admitted one before them (0 where there is none).

    A generative objective shows the noisy chunk to the network, which mixes its steps: without this, what
    stands past an episode's end would reach the loss of the steps before it. Holding the last action is also
    what a robot does there.
    """
    visible = (mask.unsqueeze(-1) if mask.ndim == 2 else mask).expand_as(actions)
    step = torch.arange(actions.shape[1], device=actions.device)[None, :, None]
    source, _ = torch.where(visible, step, -1).cummax(dim=1)
    held = actions.gather(1, source.clamp_min(0))
    return held.masked_fill(source < 0, 0.0)
