"""Flow matching with straight paths (Lipman et al. 2023), in pi0's form (Black et al. 2024, section IV).

    x_t = t * noise + (1 - t) * actions        u_t = noise - actions        loss = mean((v_t - u_t)^2)

Here t = 1 is noise and t = 0 is data, as in openpi's code; the pi0 paper counts the other way round. Sampling
follows v_t from t = 1 down to 0 in equal Euler steps.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from librobot import losses
from librobot.heads.base import ActionHead, Denoiser, Mask, hold_last

TimeDistribution = Literal["beta", "uniform", "logit_normal"]


class FlowMatching(ActionHead):
    """The denoiser predicts the velocity u_t.

    `time_distribution`: `beta` is pi0's Beta(1.5, 1), which prefers noisy times; `uniform`; `logit_normal`
    prefers the middle (Esser et al. 2024). Each is squeezed into (0.001, 1]. `steps` is the number of Euler
    steps.
    """

    generative: ClassVar[bool] = True

    def __init__(
        self,
        *,
        time_distribution: TimeDistribution = "beta",
        beta_alpha: float = 1.5,
        beta_beta: float = 1.0,
        steps: int = 10,
    ) -> None:
        super().__init__()
        if time_distribution not in get_args(TimeDistribution):
            raise ValueError(
                f"time_distribution must be one of {get_args(TimeDistribution)}, found {time_distribution!r}"
            )
        if steps < 1:
            raise ValueError(f"steps must be at least 1, found {steps}")
        self.time_distribution = time_distribution
        self.beta_alpha, self.beta_beta = beta_alpha, beta_beta
        self.steps = steps

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
        actions = hold_last(actions, mask)
        noise = torch.randn_like(actions) if noise is None else noise
        time = self.draw_time(len(actions)) if time is None else time
        t = time[:, None, None].to(actions.dtype)
        x_t = t * noise + (1 - t) * actions
        u_t = noise - actions
        v_t = denoiser(x_t, time, context)
        return losses.mse(v_t, u_t, mask)

    def sample(
        self,
        denoiser: Denoiser,
        context: Any,
        shape: tuple[int, int, int],
        *,
        noise: Float[Tensor, "*steps b k a"] | None = None,
        steps: int | None = None,
    ) -> Float[Tensor, "b k a"]:
        steps = self.steps if steps is None else steps
        x_t = (self.draw_noise(shape) if noise is None else noise).float()
        for step in range(steps):
            time = torch.full((shape[0],), 1.0 - step / steps, device=x_t.device, dtype=torch.float32)
            x_t = x_t - denoiser(x_t, time, context) / steps
        return x_t

    def draw_time(self, count: int) -> Float[Tensor, " b"]:
        """Times in (0.001, 1], in float32."""
        device = self.anchor.device
        if self.time_distribution == "uniform":
            unit = torch.rand(count, device=device, dtype=torch.float32)
        elif self.time_distribution == "logit_normal":
            unit = torch.randn(count, device=device, dtype=torch.float32).sigmoid()
        else:
            one = torch.ones((), device=device, dtype=torch.float32)
            unit = torch.distributions.Beta(self.beta_alpha * one, self.beta_beta * one).sample((count,))
        return unit * 0.999 + 0.001
