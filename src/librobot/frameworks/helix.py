"""Helix: a slow system 2 that understands and a fast system 1 that acts (Figure 2025, figure.ai/news/helix).

    system 2   a vision-language model at 7 to 9 Hz: one camera, state, instruction -> one latent vector
    system 1   80M parameters at 200 Hz: all cameras, state, the newest latent -> a chunk of actions

Trained end to end through the latent. In deployment system 1 has a latent of some time ago, so in training
system 2 sees the observation of `obs_steps - 1` control steps ago (`offset`). `sample_actions` runs both in
one call, on such a window; `librobot.two_rates` runs them at their own rates. With `plan` system 2 first
writes what it is about to do, in words: three tiers. Nothing but a web page is published:
docs/frameworks/helix.md says what is Figure's and what is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from librobot import replicas
from librobot.errors import LibrobotError, nearest
from librobot.frameworks.base import Framework, OptimizerFactory, SchedulerFactory
from librobot.frameworks.slow_thought import Plan, SlowThought, in_words, one_step, tokenized
from librobot.heads.base import ActionHead
from librobot.losses import reduce
from librobot.nn.detr import LayerOptions
from librobot.nn.fast_policy import FastDecoder, FastEncoder, Memory
from librobot.nn.multiscale import MultiScaleEyes
from librobot.nn.pooling import situation
from librobot.normalize import NormalizationMode
from librobot.types import Batch, Observation, RobotSpec
from librobot.vlms.base import VLM, Context, ObservationProcessor


@dataclass
class Situation(Memory):
    """What system 1's decoder attends to, and which action dimensions each sample's robot has."""

    owned: Bool[Tensor, "b 1 a"]
    state: Float[Tensor, "b t s"]

    @property
    def features(self) -> Float[Tensor, "b f"]:
        """What tells situations apart, for a coupling of noise and actions."""
        return situation(self.values, self.mask, self.state)


class SlowProcessor(ObservationProcessor):
    """The backbone's processor for a single step of the window: all steps' pictures have one size."""

    def __call__(
        self, prompts: list[str], images: dict[str, Tensor], state: Float[Tensor, "b t s"]
    ) -> dict[str, Tensor]:
        return super().__call__(prompts, {name: image[:, :1] for name, image in images.items()}, state[:, :1])


class Helix(Framework):
    denoiser_parts = ("fast_decoder",)
    block_lists = ("fast_encoder.encoder.layers", "fast_decoder.decoder.layers")

    def __init__(
        self,
        *,
        spec: RobotSpec,
        vlm: VLM,
        head: ActionHead,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        horizon: int = 16,
        obs_steps: int = 2,
        offset: Literal["fixed", "random"] = "fixed",
        normalization: Mapping[str, NormalizationMode],
        freeze: Sequence[str] = (),
        lr_multipliers: Mapping[str, float] | None = None,
        slow_camera: str | None = None,
        plan: bool = False,
        max_plan_tokens: int = 64,
        plan_weight: float = 0.1,
        progress: bool = False,
        latent_dim: int = 512,
        width: int = 512,
        num_heads: int = 8,
        feedforward_width: int = 2048,
        num_encoder_layers: int = 8,
        num_decoder_layers: int = 8,
        dropout: float = 0.1,
        level_channels: Sequence[int] = (64, 128, 256, 512, 704),
        num_levels_read: int = 3,
        blocks_per_level: int = 1,
        num_groups: int = 32,
        image_size: int = 224,
        embodiments: Sequence[RobotSpec] | None = None,
    ) -> None:
        if offset not in ("fixed", "random"):
            raise ValueError(f"offset must be fixed or random, found {offset!r}")
        if not spec.cameras:
            raise ValueError(f"system 2 needs a camera, and robot {spec.name!r} has none")
        slow_camera = spec.camera_names[0] if slow_camera is None else slow_camera
        if slow_camera not in spec.camera_names:
            raise ValueError(
                f"slow_camera: no camera {slow_camera!r}; {nearest(slow_camera, spec.camera_names)}"
            )
        if max_plan_tokens < 1:
            raise ValueError(f"max_plan_tokens must be at least 1, found {max_plan_tokens}")
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
            action_width=spec.action_dim + progress,
            embodiments=embodiments,
        )
        self.offset, self.slow_camera, self.has_progress = offset, slow_camera, progress
        self.has_plan, self.max_plan_tokens, self.plan_weight = plan, max_plan_tokens, plan_weight
        self.slow = SlowThought(vlm, spec.state_dim, latent_dim, plans=plan)
        layer = LayerOptions(width, num_heads, feedforward_width, dropout, activation="gelu", pre_norm=True)
        eyes = MultiScaleEyes(
            level_channels,
            num_levels_read=num_levels_read,
            blocks_per_level=blocks_per_level,
            num_groups=num_groups,
            width=width,
        )
        self.fast_encoder = FastEncoder(
            eyes,
            layer,
            num_layers=num_encoder_layers,
            num_cameras=len(spec.cameras),
            state_dim=spec.state_dim,
            latent_dim=latent_dim,
            image_size=image_size,
        )
        self.fast_decoder = FastDecoder(
            layer,
            num_layers=num_decoder_layers,
            horizon=horizon,
            action_dim=self.action_width,
            output_width=head.output_width,
            takes_noise=head.generative,
        )
        self.freeze_unused(layers=(-1,), logits=plan)
        self.apply_freeze()

    def compute_loss(
        self,
        batch: Batch,
        *,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        slow_steps: Int[Tensor, " b"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """`slow_steps` says which step of the window system 2 sees; drawn, or the first, where it is None."""
        observation = self.prepare(batch.observation)
        if slow_steps is None:
            slow_steps = self.draw_slow_steps(observation)
        seen = one_step(observation, slow_steps)
        prefix, plan_loss = self.perceive(seen), None
        if self.has_plan:
            prefix, plan_loss = self.slow.read_plan(self._backbone, prefix, self._given_plans(batch))
        latent = self.slow.latent(self._backbone, prefix, self.normalized_state(seen)[:, 0])
        actions, real = self.normalized_actions(batch), self.real_actions(batch)
        if self.has_progress:
            actions = torch.cat((actions, self._given_progress(batch).to(actions)), dim=-1)
            real = torch.cat((real, batch.action_mask[:, :, None]), dim=-1)
        memory = self.remember(observation, latent)
        per_sample = self.head.loss(self.denoise, memory, actions, real, noise=noise, time=time)
        loss = reduce(per_sample, batch.action_mask)
        if plan_loss is None:
            return loss, {}
        metrics = {"action_loss": loss.detach(), "plan_loss": plan_loss.mean().detach()}
        return loss + self.plan_weight * plan_loss.mean(), metrics

    def sample_actions(
        self,
        observation: Observation,
        *,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
    ) -> Float[Tensor, "b k a"]:
        """Both systems in turn: system 2 on the window's first step, system 1 on its last."""
        observation = self.prepare(observation)
        first = torch.zeros(len(observation.state), dtype=torch.long, device=observation.state.device)
        latent = self.think(one_step(observation, first))
        return self.act(observation, latent, noise=noise, num_steps=num_steps, guidance=guidance)[0]

    def think(self, seen: Observation, plan: Plan | None = None) -> Float[Tensor, "b z"]:
        """System 2: a prepared observation of one step to the latent. `plan` saves writing one."""
        prefix = self.perceive(seen)
        if self.has_plan:
            plan = self._write(prefix) if plan is None else plan
            prefix, _ = self.slow.read_plan(self._backbone, prefix, plan)
        return self.slow.latent(self._backbone, prefix, self.normalized_state(seen)[:, 0])

    def act(
        self,
        observation: Observation,
        latent: Float[Tensor, "b z"],
        *,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
    ) -> tuple[Float[Tensor, "b k a"], Float[Tensor, "b k"] | None]:
        """System 1: the last step of a prepared observation and a latent to actions in physical units, and,
        where the policy has `progress`, to the share of the task that will be done."""
        shape = (len(latent), self.horizon, self.action_width)
        actions = self.head.sample(
            self.denoise,
            self.remember(observation, latent),
            shape,
            noise=noise,
            num_steps=num_steps,
            guidance=guidance,
        )
        physical = self.physical_actions(actions[..., : self.spec.action_dim], observation)
        if not self.has_progress:
            return physical, None
        return physical, ((actions[..., -1].float() + 1) / 2).clamp(0.0, 1.0)

    def plan(self, observation: Observation) -> tuple[Plan, list[str]]:
        """What system 2 says it is about to do, from a prepared observation of one step; also in words."""
        written = self._write(self.perceive(observation))
        return written, in_words(self._backbone, written)

    def denoise(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], memory: Situation
    ) -> Float[Tensor, "b k o"]:
        """Dimensions that a sample's robot has not are zeros, in training as in sampling."""
        return self.fast_decoder(x_t.masked_fill(~memory.owned, 0.0), time, memory)

    def perceive(self, seen: Observation) -> Context:
        """System 2's backbone on the one camera that it has."""
        name = self.slow_camera
        seen = Observation(
            images={name: seen.images[name]},
            image_mask={name: seen.image_mask[name]},
            state=seen.state,
            prompt=seen.prompt,
            inputs=seen.inputs,
        )
        return self._backbone(seen, layers=() if self._backbone.has_cache else (-1,))

    def remember(self, observation: Observation, latent: Float[Tensor, "b z"]) -> Situation:
        """System 1's encoder on the last step; the decoder then reads its output at every sampling step."""
        last = torch.full((len(latent),), observation.state.shape[1] - 1, device=latent.device)
        now = one_step(observation, last)
        state = self.normalized_state(now)
        memory = self.fast_encoder(now, state[:, 0], latent)
        dims = self.robots.action_dims[self.embodiment_ids(observation)]
        owned = torch.arange(self.action_width, device=dims.device) < dims[:, None]
        if self.has_progress:
            owned[:, -1] = True
        return Situation(memory.values, memory.mask, owned[:, None], state)

    def draw_slow_steps(self, observation: Observation) -> Int[Tensor, " b"]:
        """The step of the window that system 2 sees in training."""
        b, device = len(observation.state), observation.state.device
        if self.offset == "random" and self.training:
            return replicas.draw(lambda n: torch.randint(self.obs_steps, (n,), device=device), b)
        return torch.zeros(b, dtype=torch.long, device=device)

    @property
    def processor(self) -> ObservationProcessor:
        return SlowProcessor(self._backbone.processor, (self.slow_camera,), self.prompt_writer())

    @property
    def _backbone(self) -> VLM:
        assert self.vlm is not None
        return self.vlm

    def _write(self, prefix: Context) -> Plan:
        return self.slow.write_plan(self._backbone, prefix, self.max_plan_tokens)

    def _given_plans(self, batch: Batch) -> Plan:
        texts = self._extra(batch, "plan", "the text of each sample's plan, '' where it has none")
        return tokenized(self._backbone, texts, self.max_plan_tokens, batch.actions.device)

    def _given_progress(self, batch: Batch) -> Float[Tensor, "b k 1"]:
        """From [0, 1] to [-1, 1], near the spread of normalised actions."""
        share = self._extra(batch, "progress", "(b, k) numbers from 0 at an episode's start to 1 at its end")
        return 2 * share[:, :, None] - 1

    @staticmethod
    def _extra(batch: Batch, name: str, what: str) -> Any:
        if name not in batch.extra:
            raise LibrobotError(
                f"framework.{name}=true needs Batch.extra[{name!r}] ({what}), and the data have none; take "
                f"data that do, or leave framework.{name}=false"
            )
        return batch.extra[name]
