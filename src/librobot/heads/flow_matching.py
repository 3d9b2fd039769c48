"""Flow matching with straight paths (Lipman et al. 2023; rectified flow, Liu et al. 2023).

    x_t = t * noise + (1 - t) * actions        u_t = noise - actions        loss = mean((v_t - u_t)^2)

Here t = 1 is noise and t = 0 is data, as in openpi's code. The pi0 paper (Black et al. 2024, section IV) and
GR00T count the other way round: `time_convention` says which of the two the network sees, and everything else
stays the same. Sampling follows v_t from t = 1 down to 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from librobot import losses, replicas
from librobot.heads import ode_solvers
from librobot.heads.base import ActionHead, Denoiser, Mask, at_least_one, hold_last
from librobot.heads.coupling import optimal_partners

TimeDistribution = Literal["beta", "uniform", "logit_normal", "beta_stretched"]
TimeConvention = Literal["noise_at_one", "noise_at_zero"]
Coupling = Literal["independent", "optimal_transport"]


class FlowMatching(ActionHead):
    """The denoiser predicts the velocity.

    `time_distribution`: `beta` is pi0's Beta(1.5, 1), which prefers noisy times; `uniform`; `logit_normal`
    prefers the middle (Esser et al. 2024). Each is squeezed into (0.001, 1], which for `beta` is the draw of
    GR00T N1.6 and N1.7 as well; `beta_stretched` is GR00T N1.5's, Beta(1.5, 1) / 0.999.

    `solver`: `euler`, `midpoint`, `heun` with `num_steps` equal steps, or `adaptive` within `rtol` and
    `atol`, where `num_steps` has no effect.

    `coupling` optimal_transport pairs noise and actions within the batch (`librobot.heads.coupling`); noise
    that is given is taken as it is.
    """

    generative: ClassVar[bool] = True

    def __init__(
        self,
        *,
        time_distribution: TimeDistribution = "beta",
        beta_alpha: float = 1.5,
        beta_beta: float = 1.0,
        time_convention: TimeConvention = "noise_at_one",
        coupling: Coupling = "independent",
        condition_weight: float = 10.0,
        solver: ode_solvers.Solver = "euler",
        num_steps: int = 10,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        dim_weights: Sequence[float] | None = None,
        drop_context: float = 0.0,
    ) -> None:
        super().__init__(dim_weights=dim_weights, drop_context=drop_context)
        for name, value, options in (
            ("time_distribution", time_distribution, get_args(TimeDistribution)),
            ("time_convention", time_convention, get_args(TimeConvention)),
            ("coupling", coupling, get_args(Coupling)),
            ("solver", solver, get_args(ode_solvers.Solver)),
        ):
            if value not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}, found {value!r}")
        self.time_distribution = time_distribution
        self.beta_alpha, self.beta_beta = beta_alpha, beta_beta
        self.time_convention, self.coupling = time_convention, coupling
        self.condition_weight = condition_weight
        self.solver, self.rtol, self.atol = solver, rtol, atol
        self.num_steps = at_least_one(num_steps)

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
        noise = self.couple(actions, mask, context) if noise is None else noise
        time = self.draw_time(len(actions)) if time is None else time
        t = time[:, None, None].to(actions.dtype)
        x_t = t * noise + (1 - t) * actions
        u_t = noise - actions
        v_t = self.velocity(denoiser, x_t, time, self.training_context(context, len(actions)))
        return losses.mse(v_t, u_t, mask, self.dim_weights)

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
        num_steps = self.num_steps if num_steps is None else at_least_one(num_steps)
        noise = self.draw_noise(shape) if noise is None else noise
        denoiser = self.guided(denoiser, context, shape[0], guidance)

        def velocity(x_t: Tensor, time: float) -> Tensor:
            times = torch.full((shape[0],), time, device=x_t.device, dtype=torch.float32)
            return self.velocity(denoiser, x_t, times, context).float()

        if self.solver == "adaptive":
            return ode_solvers.integrate_adaptively(velocity, noise, rtol=self.rtol, atol=self.atol)
        return ode_solvers.integrate(velocity, noise, num_steps, self.solver)

    def num_calls(self, num_steps: int) -> int | None:
        """The network calls of a sample; None where the solver decides."""
        return None if self.solver == "adaptive" else ode_solvers.CALLS[self.solver] * num_steps

    def velocity(
        self, denoiser: Denoiser, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], context: Any
    ) -> Float[Tensor, "b k a"]:
        """The network's velocity, from data towards noise."""
        if self.time_convention == "noise_at_one":
            return denoiser(x_t, time, context)
        return -denoiser(x_t, 1 - time, context)

    def couple(self, actions: Float[Tensor, "b k a"], mask: Mask, context: Any) -> Float[Tensor, "b k a"]:
        """Noise for the actions of a batch. Raises ValueError where the coupling needs features and there are
        none."""
        noise = replicas.randn_like(actions)
        if self.coupling == "independent":
            return noise
        if not hasattr(context, "features"):
            raise ValueError(
                "coupling=optimal_transport needs a context with features that tell situations apart, which "
                "this framework's has not; take framework=pi0 or framework=custom, or coupling=independent"
            )
        visible = (mask.unsqueeze(-1) if mask.ndim == 2 else mask).expand_as(actions)
        return noise[optimal_partners(noise, actions, visible, context.features, self.condition_weight)]

    def draw_time(self, count: int) -> Float[Tensor, " b"]:
        """Times in (0.001, 1], in float32; `beta_stretched` ones in (0, 1.001]."""
        device = self.anchor.device
        if self.time_distribution == "uniform":
            unit = replicas.draw(lambda n: torch.rand(n, device=device, dtype=torch.float32), count)
        elif self.time_distribution == "logit_normal":
            unit = replicas.draw(
                lambda n: torch.randn(n, device=device, dtype=torch.float32), count
            ).sigmoid()
        else:
            one = torch.ones((), device=device, dtype=torch.float32)
            beta = torch.distributions.Beta(self.beta_alpha * one, self.beta_beta * one)
            unit = replicas.draw(lambda n: beta.sample((n,)), count)
        return unit / 0.999 if self.time_distribution == "beta_stretched" else unit * 0.999 + 0.001
