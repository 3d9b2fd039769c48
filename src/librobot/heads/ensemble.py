"""Deep ensemble (Lakshminarayanan et al. 2017): members that agree where they were trained.

The denoiser returns the outputs of all members side by side; each is trained by the nested head as if it
were alone. Members are as different as the network makes them: `network=ensemble` gives each its own weights,
while a network that shares all but its last layer makes them agree too readily.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from librobot.heads.base import ActionHead, Denoiser, Mask


class Ensemble(ActionHead):
    """`head` is that of every member: one that calls the denoiser once.

    `combine` is what is sampled: the members' `mean`, or one member by its index. `bootstrap` weights each
    member's loss of each training sample by a number drawn from Poisson(1) (Oza and Russell 2001). It is
    drawn afresh in every batch, so over many epochs all members see all samples, only in different
    proportions at a time. Without it members differ by their initial weights alone, which Lakshminarayanan
    et al. found to suffice.
    """

    generative: ClassVar[bool] = False

    def __init__(
        self,
        *,
        head: ActionHead,
        num_members: int = 5,
        combine: Literal["mean"] | int = "mean",
        bootstrap: bool = False,
    ) -> None:
        super().__init__()
        if head.network != "denoiser" or head.generative:
            raise ValueError(
                f"head must be one that calls the denoiser once, such as L1 or GaussianMixture, found "
                f"{type(head).__name__}; for diffusion and flow compare samples from different noise instead "
                f"(librobot.heads.ensemble.spread)"
            )
        if num_members < 2:
            raise ValueError(f"num_members must be at least 2, found {num_members}")
        if combine != "mean" and combine not in range(num_members):
            raise ValueError(
                f"combine must be 'mean' or a member's index below {num_members}, found {combine!r}"
            )
        if combine == "mean" and head.stochastic:
            raise ValueError(
                f"combine must be a member's index for {type(head).__name__}, whose draws may be of "
                f"different modes, found 'mean'; or set head.head.mode=best"
            )
        self.head, self.num_members = head, num_members
        self.combine, self.bootstrap = combine, bootstrap

    @property
    def stochastic(self) -> bool:
        return self.head.stochastic

    def attach(self, *, horizon: int, action_dim: int, real_dim: int | None = None) -> None:
        super().attach(horizon=horizon, action_dim=action_dim, real_dim=real_dim)
        self.real_dim = action_dim if real_dim is None else real_dim
        self.head.attach(horizon=horizon, action_dim=action_dim, real_dim=real_dim)

    @property
    def output_width(self) -> int:
        return self.num_members * self.head.output_width

    @property
    def needs_fit(self) -> bool:
        return self.head.needs_fit

    def fit(self, actions: Float[Tensor, "n k a"]) -> None:
        self.head.fit(actions)

    def files(self) -> dict[str, str]:
        return self.head.files()

    def restore(self, files: Mapping[str, str]) -> None:
        self.head.restore(files)

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
        """The mean of the members' losses."""
        members = self._members(denoiser, context, torch.zeros_like(actions))
        per_member = torch.stack(
            [self.head.loss(member, context, actions, mask, noise=noise, time=time) for member in members]
        )
        if self.bootstrap and self.training:
            per_member = per_member * torch.poisson(torch.ones_like(per_member))
        return per_member.mean(dim=0)

    def sample(
        self,
        denoiser: Denoiser,
        context: Any,
        shape: tuple[int, int, int],
        *,
        noise: Float[Tensor, "*steps b k a"] | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
    ) -> Float[Tensor, "b k a"]:
        self.no_guidance(guidance)
        samples = self.sample_members(denoiser, context, shape, noise=noise)
        return samples.mean(dim=0) if self.combine == "mean" else samples[self.combine]

    def sample_members(
        self,
        denoiser: Denoiser,
        context: Any,
        shape: tuple[int, int, int],
        *,
        noise: Float[Tensor, "b k a"] | None = None,
    ) -> Float[Tensor, "m b k a"]:
        """Each member's actions, all from the same noise."""
        if noise is None and self.stochastic:
            noise = self.draw_noise(shape)
        members = self._members(denoiser, context, self.anchor.new_zeros(shape))
        return torch.stack([self.head.sample(member, context, shape, noise=noise) for member in members])

    def disagreement(
        self,
        denoiser: Denoiser,
        context: Any,
        shape: tuple[int, int, int],
        *,
        noise: Float[Tensor, "b k a"] | None = None,
    ) -> Float[Tensor, "b k"]:
        """How far the members are apart at each step, in normalised units; see `spread`. Dimensions that a
        framework pads with are left out."""
        samples = self.sample_members(denoiser, context, shape, noise=noise)
        return spread(samples[..., : self.real_dim])

    def _members(self, denoiser: Denoiser, context: Any, zeros: Float[Tensor, "b k a"]) -> list[Denoiser]:
        """Denoisers that return their part of one call's output."""
        output = denoiser(zeros, zeros[:, 0, 0], context)
        parts = rearrange(output, "b k (m o) -> m b k o", m=self.num_members)
        return [lambda x_t, time, context, part=part: part for part in parts]


def spread(samples: Float[Tensor, "m b k a"]) -> Float[Tensor, "b k"]:
    """The standard deviation over m sampled chunks (without bias in its square): the root mean square of the
    dimensions'. Also for samples that one head draws from different noise.

    Raises ValueError for fewer than two chunks.
    """
    if len(samples) < 2:
        raise ValueError(f"samples must hold at least 2 chunks to compare, found {len(samples)}")
    return samples.float().var(dim=0).mean(dim=-1).sqrt()
