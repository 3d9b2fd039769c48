"""The template: a policy put together from parts in YAML alone.

    pictures, instruction   vlm=            the backbone's hidden states, projected to `width`
    state                   state_encoder=  tokens of each observation step
    several steps           history=        what becomes of the state tokens of all steps
    both together           fusion=         the tokens that the network attends to, after one start token
    actions                 network=        a denoiser or a decoder over those tokens; head= says which

Pictures of several observation steps are read by the backbone in one sequence. A start token of its own is
always the first of the context; where `head.drop_context` hides the observation, it alone is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from librobot.frameworks.base import Framework, OptimizerFactory, SchedulerFactory
from librobot.heads.base import ActionHead
from librobot.losses import reduce
from librobot.networks.base import OPTION_OF, ContextTokens, Network, NetworkFactory, Sizes
from librobot.nn.pooling import situation
from librobot.normalize import NormalizationMode
from librobot.types import Batch, Observation, RobotSpec
from librobot.vlms.base import VLM

ModuleFactory = Callable[..., nn.Module]


class Custom(Framework):
    brings = ("denoiser", "decoder", "pair")
    denoiser_parts = ("network",)

    def __init__(
        self,
        *,
        spec: RobotSpec,
        vlm: VLM,
        head: ActionHead,
        network: NetworkFactory,
        fusion: ModuleFactory,
        state_encoder: ModuleFactory | None = None,
        history: ModuleFactory | None = None,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        horizon: int = 16,
        obs_steps: int = 1,
        normalization: Mapping[str, NormalizationMode],
        freeze: Sequence[str] = (),
        lr_multipliers: Mapping[str, float] | None = None,
        width: int = 256,
        embodiments: Sequence[RobotSpec] | None = None,
    ) -> None:
        super().__init__(
            spec=spec,
            vlm=vlm,
            head=head,
            optimizer=optimizer,
            scheduler=scheduler,
            horizon=horizon,
            obs_steps=obs_steps,
            normalization=normalization,
            freeze=freeze,
            lr_multipliers=lr_multipliers,
            embodiments=embodiments,
        )
        self.width = width
        self.observation_proj = nn.Linear(vlm.hidden_size, width)
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.state_encoder = self.history = None
        if state_encoder is not None and spec.state_dim:
            if history is None:
                raise ValueError("state tokens of several steps need history=, such as history=concatenate")
            self.state_encoder = state_encoder(state_dim=spec.state_dim, obs_steps=1, width=width)
            self.history = history(width=width, obs_steps=obs_steps)
        self.fusion = fusion(width=width) if self.state_encoder is not None else None
        self.network = self._make_network(network, head)
        lists = (name for name in ("blocks", "down", "middle", "up") if hasattr(self.network, name))
        self.block_lists = tuple(f"network.{name}" for name in lists)
        self.freeze_unused(layers=(-1,))
        self.apply_freeze()

    def compute_loss(
        self, batch: Batch, *, noise: Tensor | None = None, time: Tensor | None = None
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        actions = self.normalized_actions(batch)
        context = self.context(batch.observation)
        real = self.real_actions(batch)
        per_sample = self.head.loss(self.network, context, actions, real, noise=noise, time=time)
        loss = reduce(per_sample, batch.action_mask)
        auxiliary = getattr(self.state_encoder, "auxiliary_loss", None)
        if auxiliary is None:
            return loss, {}
        value = auxiliary()
        return loss + value, {"action_loss": loss.detach(), "state_loss": value.detach()}

    def sample_actions(
        self,
        observation: Observation,
        *,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
    ) -> Float[Tensor, "b k a"]:
        shape = (observation.batch_size, self.horizon, self.action_width)
        context = self.context(observation)
        actions = self.head.sample(
            self.network, context, shape, noise=noise, num_steps=num_steps, guidance=guidance
        )
        return self.physical_actions(actions, observation)

    def denoise(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], context: ContextTokens
    ) -> Float[Tensor, "b k o"]:
        return self.network(x_t, time, context)

    def context(self, observation: Observation) -> ContextTokens:
        """All that the network attends to, computed once for all sampling steps."""
        observation = self.prepare(observation)
        state = self.normalized_state(observation)
        assert self.vlm is not None
        seen = self.vlm(observation)
        vision = self.observation_proj(seen.hidden.to(self.compute_dtype))
        values, mask = vision, seen.mask
        if self.fusion is not None:
            values, mask = self.fusion(vision, seen.mask, self.state_tokens(state))
        start = repeat(self.start.to(values), "d -> b 1 d", b=len(values))
        return ContextTokens(
            values=torch.cat((start, values), dim=1),
            mask=torch.cat((mask.new_ones(len(mask), 1), mask), dim=1),
            features=situation(seen.hidden, seen.mask, state),
            null=self.start,
        )

    def state_tokens(self, state: Float[Tensor, "b t s"]) -> Float[Tensor, "b n d"]:
        """Tokens of all steps' states."""
        assert self.state_encoder is not None
        assert self.history is not None
        tokens = self.state_encoder(rearrange(state, "b t s -> (b t) 1 s"))
        return self.history(rearrange(tokens, "(b t) n d -> b t n d", b=len(state)))

    def _make_network(self, network: NetworkFactory, head: ActionHead) -> Network:
        """The network in the head's sizes. Raises ValueError where it is of the wrong kind."""
        kind: Any = getattr(network, "func", network)  # a YAML's is a functools.partial of the class
        if kind.kind != head.network:
            raise ValueError(
                f"head {type(head).__name__} needs a {head.network}, and network {kind.__name__} is a "
                f"{kind.kind}; take network={OPTION_OF[head.network]}"
            )
        return network(sizes=Sizes.of(head, self.width))
