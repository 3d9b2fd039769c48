"""Octo: a generalist policy with readout tokens (Octo Model Team 2024, arXiv 2405.12213; octo-models/octo).

    task     16 language tokens
    step i   {primary camera: 256, wrist camera: 64, the task's tokens again} {readout: 1}  i < window
    actions  the mean of the last step's readouts -> a small diffusion head, the chunk flattened

Attention is causal from step to step, free within one. Readouts read the task and what was seen; no other
token reads them, so that a new head with new readouts leaves the pretrained computation as it was. A goal
picture is stacked behind each observed one, channel by channel. In training the goal or the instruction, and
cameras, are hidden at random: at test time any of them may be missing.

Deviations, and what each option is for: docs/frameworks/octo.md.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from librobot.errors import LibrobotError
from librobot.frameworks.base import Framework, OptimizerFactory, SchedulerFactory
from librobot.heads.base import ActionHead
from librobot.losses import reduce
from librobot.nn.block_transformer import AttentionPool, BlockTransformer
from librobot.nn.instructions import ByteInstruction, InstructionEncoder
from librobot.nn.octo_tokens import BackboneTokens, CameraTokens, Kept, OctoTokens, StateTokens, Tokens
from librobot.nn.pooling import situation
from librobot.nn.score_network import ScoreNetwork
from librobot.nn.small_stem import SmallStem
from librobot.normalize import NormalizationMode
from librobot.types import Batch, Observation, RobotSpec
from librobot.vlms.base import VLM, ObservationProcessor

FROZEN: dict[str, tuple[str, ...]] = {
    "full": (),
    "head_only": ("tokens", "transformer"),
    "head_mlp_only": ("tokens", "transformer", "pool.probe", "pool.attention"),
}
"""Octo's ways to fine-tune -> the parts that stay as they are (T5 trains in none of them)."""


@dataclass
class Readout:
    """What the score network is given: one embedding, and which action dimensions the robot has."""

    embedding: Float[Tensor, "b d"]
    owned: Bool[Tensor, "b 1 a"]
    state: Float[Tensor, "b t s"]

    @property
    def features(self) -> Float[Tensor, "b f"]:
        """What tells situations apart, for a coupling of noise and actions."""
        everyone = torch.ones_like(self.embedding[:, :1], dtype=torch.bool)
        return situation(self.embedding[:, None], everyone, self.state)

    def dropped(self, rows: Bool[Tensor, " b"]) -> Readout:
        """Those samples without an observation."""
        return replace(self, embedding=self.embedding.masked_fill(rows[:, None], 0.0))


class Octo(Framework):
    denoiser_parts = ("score",)
    block_lists = ("transformer.blocks",)
    state_options: ClassVar[Mapping[str, Any]] = {"state_tokens": True}
    state_dims: Tensor

    def __init__(
        self,
        *,
        spec: RobotSpec,
        vlm: VLM,
        head: ActionHead,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        horizon: int = 4,
        obs_steps: int = 2,
        normalization: Mapping[str, NormalizationMode],
        normalize_gripper: bool = False,
        freeze: Sequence[str] = (),
        finetune: Literal["full", "head_only", "head_mlp_only"] = "full",
        lr_multipliers: Mapping[str, float] | None = None,
        width: int = 384,
        num_layers: int = 12,
        num_heads: int = 6,
        feedforward_width: int = 1536,
        dropout: float = 0.0,
        max_obs_steps: int = 10,
        num_readouts: int = 1,
        repeat_task_tokens: bool = True,
        backbone: Literal["octo", "vlm"] = "octo",
        text_encoder: Literal["bytes", "t5"] = "bytes",
        text_checkpoint: str = "google-t5/t5-base",
        text_pretrained: bool = True,
        text_config: Mapping[str, Any] | None = None,
        num_text_tokens: int = 16,
        max_prompt_tokens: int = 96,
        image_size: int = 256,
        wrist_image_size: int = 128,
        wrist_cameras: Sequence[str] = ("*wrist*", "*hand*"),
        stem_channels: Sequence[int] = (32, 96, 192, 384),
        stem_width: int = 512,
        num_groups: int = 32,
        goal_images: bool = True,
        goal_relabeling: Literal["none", "uniform"] = "none",
        state_tokens: bool = False,
        num_state_bins: int = 256,
        pool: Literal["mean", "attention"] = "mean",
        head_width: int = 256,
        num_blocks: int = 3,
        time_width: int = 32,
        keep_goal: float = 0.5,
        camera_dropout: float = 0.0,
        embodiments: Sequence[RobotSpec] | None = None,
    ) -> None:
        for name, value, options in (
            ("finetune", finetune, tuple(FROZEN)),
            ("backbone", backbone, ("octo", "vlm")),
            ("text_encoder", text_encoder, ("bytes", "t5")),
            ("pool", pool, ("mean", "attention")),
            ("goal_relabeling", goal_relabeling, ("none", "uniform")),
        ):
            if value not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}, found {value!r}")
        for name, share in (("keep_goal", keep_goal), ("camera_dropout", camera_dropout)):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{name} must lie between 0 and 1, found {share}")
        if obs_steps > max_obs_steps:
            raise ValueError(f"obs_steps must be at most max_obs_steps={max_obs_steps}, found {obs_steps}")
        frozen = FROZEN[finetune] if pool == "attention" else FROZEN[finetune][:2]  # a mean has no parts
        super().__init__(
            spec=spec,
            vlm=vlm if backbone == "vlm" else None,
            head=head,
            optimizer=optimizer,
            scheduler=scheduler,
            horizon=horizon,
            obs_steps=obs_steps,
            normalization=normalization,
            freeze=(*freeze, *frozen, *(("vlm",) if frozen and backbone == "vlm" else ())),
            lr_multipliers=lr_multipliers,
            embodiments=embodiments,
        )
        if not normalize_gripper:
            self.normalizer.leave("action", self.robots.actions_of_kind("gripper"))
        self.reads_goals = goal_images and backbone == "octo"
        if goal_relabeling == "uniform" and not self.reads_goals:
            raise ValueError("goal_relabeling=uniform needs goal_images=true and backbone=octo")
        self.wants_goals = goal_relabeling == "uniform"
        self.keep_goal, self.camera_dropout = keep_goal, camera_dropout
        state_dims = torch.tensor([robot.state_dim for robot in self.embodiments])
        self.register_buffer("state_dims", state_dims, persistent=False)

        state = None
        if state_tokens and spec.state_dim:
            state = StateTokens(spec.state_dim, num_state_bins, width, max_obs_steps)
        self.tokens: OctoTokens | BackboneTokens
        if self.vlm is not None:
            self.tokens = BackboneTokens(
                self.vlm.hidden_size, state, width=width, max_steps=max_obs_steps, num_readouts=num_readouts
            )
        else:
            cameras = []
            for name in spec.camera_names:
                wrist = any(fnmatch.fnmatch(name, pattern) for pattern in wrist_cameras)
                stem = SmallStem(
                    stem_channels,
                    num_groups=num_groups,
                    in_channels=6 if goal_images else 3,
                    width=stem_width,
                )
                camera = CameraTokens(
                    stem,
                    wrist_image_size if wrist else image_size,
                    stem_width=stem_width,
                    width=width,
                    max_steps=max_obs_steps,
                    goal=goal_images,
                )
                cameras.append(camera)
            text: InstructionEncoder = ByteInstruction(width, max_prompt_tokens, num_text_tokens)
            if text_encoder == "t5":
                from librobot.vlms.t5 import T5Instruction

                text = T5Instruction(
                    checkpoint=text_checkpoint,
                    pretrained=text_pretrained,
                    config=text_config,
                    num_tokens=num_text_tokens,
                )
            self.tokens = OctoTokens(
                text=text,
                cameras=cameras,
                state=state,
                width=width,
                max_steps=max_obs_steps,
                num_readouts=num_readouts,
                repeat_task=repeat_task_tokens,
            )
        self.transformer = BlockTransformer(width, num_layers, num_heads, feedforward_width, dropout)
        self.pool = AttentionPool(width) if pool == "attention" else None
        self.score = ScoreNetwork(
            width,
            horizon=horizon,
            action_dim=spec.action_dim,
            output_width=head.output_width,
            takes_noise=head.generative,
            width=head_width,
            num_blocks=num_blocks,
            time_width=time_width,
        )
        self.freeze_unused(layers=(-1,))
        self.apply_freeze()

    def compute_loss(
        self,
        batch: Batch,
        *,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        kept: Kept | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """`kept` fixes which modalities are hidden; in training it is drawn where it is None."""
        actions = self.normalized_actions(batch)
        if kept is None:
            kept = Kept.of(batch.observation)
            if self.training:
                kept = kept.thinned(self.keep_goal, self.camera_dropout)
        readout = self.readout(batch.observation, kept)
        real = self.real_actions(batch)
        per_sample = self.head.loss(self.denoise, readout, actions, real, noise=noise, time=time)
        return reduce(per_sample, batch.action_mask), {}

    def sample_actions(
        self,
        observation: Observation,
        *,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
    ) -> Float[Tensor, "b k a"]:
        readout = self.readout(observation, Kept.of(observation))
        shape = (observation.batch_size, self.horizon, self.action_width)
        actions = self.head.sample(
            self.denoise, readout, shape, noise=noise, num_steps=num_steps, guidance=guidance
        )
        return self.physical_actions(actions, observation)

    def denoise(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], readout: Readout
    ) -> Float[Tensor, "b k o"]:
        """Dimensions that a sample's robot has not are zeros, in training as in sampling."""
        return self.score(x_t.masked_fill(~readout.owned, 0.0), time, readout.embedding)

    def readout(self, observation: Observation, kept: Kept) -> Readout:
        """The transformer, once for all sampling steps: the last step's readouts as one vector."""
        observation = self.prepare(observation)
        state = self.normalized_state(observation)
        tokens = self.embed(observation, state, kept)
        read = self.transformer(tokens.task, tokens.task_real, tokens.seen, tokens.seen_real, tokens.readouts)
        embedding = read[:, -1].mean(dim=1) if self.pool is None else self.pool(read[:, -1])
        return Readout(
            embedding, self.owned(self.robots.action_dims, self.spec.action_dim, observation), state
        )

    def embed(self, observation: Observation, state: Float[Tensor, "b t s"], kept: Kept) -> Tokens:
        """The transformer's input."""
        state_real = self.owned(self.state_dims, self.spec.state_dim, observation)[:, 0]
        if isinstance(self.tokens, OctoTokens):
            return self.tokens(observation, state, state_real, kept)
        if observation.goal_images:
            raise LibrobotError(
                "framework.backbone=vlm reads no goal pictures, and the observation has some; leave them "
                "out, or take framework.backbone=octo"
            )
        assert self.vlm is not None
        context = self.vlm(replace(observation, image_mask=kept.cameras))
        return self.tokens(context.hidden, context.mask, state, state_real)

    @property
    def processor(self) -> ObservationProcessor | None:
        if isinstance(self.tokens, OctoTokens):
            return ObservationProcessor(self.tokens.text.processor, self.spec.camera_names)
        return super().processor

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if isinstance(self.tokens, OctoTokens):
            checkpoint["librobot"]["backbone"] = self.tokens.text.files()

    def owned(self, dims: Tensor, width: int, observation: Observation) -> Bool[Tensor, "b 1 n"]:
        """Which of `width` dimensions each sample's robot has."""
        own = dims[self.embodiment_ids(observation)]
        return (torch.arange(width, device=own.device) < own[:, None])[:, None]
