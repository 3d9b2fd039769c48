"""GR00T N1.5, N1.6 and N1.7 (Bjorck et al. 2025, arXiv 2503.14734, and NVIDIA's later releases).

System 2, a truncated backbone, gives hidden states. System 1, a diffusion transformer over a state token and
the noisy actions, attends to them and to itself in turn. Encoders and decoder have weights of their own for
each kind of robot, so that one batch can hold samples of several.

    backbone  [ pictures | instruction ] -> LayerNorm -> fusion transformer (N1.5, N1.7)
                       ^ cross-attention in even blocks: all tokens (N1.5), or text and pictures in turn
    suffix    [ state | future tokens (N1.5) | actions ]  self-attention in odd blocks
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from librobot import replicas
from librobot.errors import LibrobotError
from librobot.frameworks.base import Framework, OptimizerFactory, SchedulerFactory
from librobot.heads.base import ActionHead
from librobot.losses import reduce
from librobot.nn.cross_attention import KeysValues
from librobot.nn.embodiments import EmbodimentActionEncoder, EmbodimentMLP, Slots
from librobot.nn.pooling import situation
from librobot.nn.squeezed_pictures import SizedProcessor, squeezed
from librobot.nn.vision_language_dit import FusionTransformer, Sights, VisionLanguageDiT
from librobot.normalize import NormalizationMode
from librobot.types import Batch, Observation, RobotSpec
from librobot.vlms.base import VLM, ObservationProcessor, PromptWriter

DroppedState = Literal["learned", "zeros"]
CrossAttentionPattern = Literal["all", "text_and_pictures"]
BOUNDED = ("min_max", "quantile")  # the modes whose numbers are clipped to [-1, 1]


@dataclass
class Condition:
    """What the denoiser needs beside the noisy actions."""

    sights: Sights
    mask: Bool[Tensor, "b l"]  # the backbone's real tokens
    state: Float[Tensor, "b t s"]  # normalised
    state_token: Float[Tensor, "b n d"]  # n is 0 where the robot has no state
    slots: Slots
    read: tuple[KeysValues, ...] | None = None

    @property
    def features(self) -> Float[Tensor, "b f"]:
        """What tells situations apart, for a coupling of noise and actions."""
        return situation(self.sights.tokens, self.mask, self.state)

    def dropped(self, rows: Bool[Tensor, " b"]) -> Condition:
        """Without pictures and instruction in those samples; the state stays."""
        seen = ~rows[:, None]
        text = self.mask if self.sights.text is None else self.sights.text
        pictures = torch.zeros_like(self.mask) if self.sights.pictures is None else self.sights.pictures
        return replace(self, sights=replace(self.sights, text=text & seen, pictures=pictures & seen))


@dataclass(frozen=True)
class FormalPrompt:
    """Instructions in lower case and without punctuation, as GR00T was trained (`formalize_language`)."""

    def __call__(self, prompts: list[str], state: Float[Tensor, "b t s"]) -> list[str]:
        return [re.sub(r"[^\w\s]", "", prompt.lower()) for prompt in prompts]


class Groot(Framework):
    """One class for the three releases; their YAMLs hold the differences.

    `max_state_dim` and `max_action_dim` are the widths that vectors are zero-padded to (null: the widest
    robot's own). `slots` gives each robot of `embodiments` its set of weights among `num_embodiments`; null
    is their order. Normalised numbers of bounded modes are clipped to [-1, 1] with `clip_normalized`.

    With `picture_size` pictures are squeezed to it, the middle `picture_crop` of each side is cut out and
    brought to that size again (N1.7: 256 and 230 / 256); null leaves them to the backbone.

    `see_padding` lets the fusion transformer, and a cross-attention of pattern `all`, read padding as well,
    as published: a sample then depends on the others of its batch.

    `step_statistics` normalises each action of a chunk by statistics of its own. It matters where actions are
    relative to the state (`actions=relative`), whose spread grows along the chunk; it is an option of its own
    because `actions=` says which numbers a policy sees, and this how they are scaled: relative actions are
    published with one scale for all steps too (lerobot's).
    """

    slot_table: Tensor
    denoiser_parts: ClassVar[tuple[str, ...]] = (
        "dit", "action_encoder", "action_positions", "action_decoder", "future_tokens",
    )  # fmt: skip

    block_lists = ("fusion.blocks", "dit.blocks")

    def __init__(
        self,
        *,
        spec: RobotSpec,
        vlm: VLM,
        head: ActionHead,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        horizon: int = 40,
        obs_steps: int = 1,
        normalization: Mapping[str, NormalizationMode],
        freeze: Sequence[str] = (),
        lr_multipliers: Mapping[str, float] | None = None,
        max_state_dim: int | None = 132,
        max_action_dim: int | None = 132,
        num_embodiments: int = 32,
        slots: Sequence[int] | None = None,
        picture_size: Sequence[int] | None = None,
        picture_crop: float = 1.0,
        clip_normalized: bool = True,
        step_statistics: bool = False,
        formalize_language: bool = True,
        width: int = 1536,
        mlp_width: int = 1024,
        num_dit_layers: int = 32,
        num_heads: int = 32,
        cross_attention: CrossAttentionPattern = "text_and_pictures",
        text_every: int = 2,
        num_fusion_layers: int = 4,
        num_fusion_heads: int = 32,
        see_padding: bool = False,
        num_future_tokens: int = 0,
        max_positions: int = 1024,
        num_time_buckets: int = 1000,
        dropout: float = 0.2,
        state_dropout: float = 0.2,
        dropped_state: DroppedState = "zeros",
        embodiments: Sequence[RobotSpec] | None = None,
    ) -> None:
        for name, value, needed in (
            ("max_state_dim", max_state_dim, spec.state_dim),
            ("max_action_dim", max_action_dim, spec.action_dim),
            ("max_positions", max_positions, horizon),
            ("num_dit_layers", num_dit_layers, 1),
            ("text_every", text_every, 1),
        ):
            if value is not None and value < needed:
                raise ValueError(f"{name} must be at least {needed} for robot {spec.name!r}, found {value}")
        if not 0.0 < picture_crop <= 1.0:
            raise ValueError(f"picture_crop must be above 0 and at most 1, found {picture_crop}")
        for name, choice, options in (
            ("cross_attention", cross_attention, get_args(CrossAttentionPattern)),
            ("dropped_state", dropped_state, get_args(DroppedState)),
        ):
            if choice not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}, found {choice!r}")
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
            action_width=max_action_dim,
            embodiments=embodiments,
        )
        self.state_width = spec.state_dim if max_state_dim is None else max_state_dim
        self.slot_of_robot = self._slots(slots, num_embodiments)
        self.register_buffer("slot_table", torch.tensor(self.slot_of_robot), persistent=False)
        self.bounded = {key for key, mode in normalization.items() if clip_normalized and mode in BOUNDED}
        if step_statistics:
            self.normalizer.by_step("action", horizon)
        self.formalize_language = formalize_language
        self.picture_size = None if picture_size is None else (int(picture_size[0]), int(picture_size[1]))
        self.picture_crop = picture_crop
        self.cross_attention, self.see_padding = cross_attention, see_padding
        self.num_time_buckets = num_time_buckets
        self.state_dropout = state_dropout

        self.vision_language_norm = nn.LayerNorm(vlm.hidden_size)
        self.fusion = FusionTransformer(vlm.hidden_size, num_fusion_layers, num_fusion_heads, dropout)
        self.state_encoder: EmbodimentMLP | None = None
        self.dropped_state: nn.Parameter | None = None
        if self.state_width:
            inputs = obs_steps * self.state_width
            self.state_encoder = EmbodimentMLP(num_embodiments, inputs, mlp_width, width)
            if state_dropout and dropped_state == "learned":
                self.dropped_state = nn.Parameter(0.02 * torch.randn(width))
        self.future_tokens: nn.Parameter | None = None
        if num_future_tokens:
            self.future_tokens = nn.Parameter(0.02 * torch.randn(num_future_tokens, width))
        self.action_encoder: EmbodimentActionEncoder | None = None
        if head.generative:
            self.action_encoder = EmbodimentActionEncoder(num_embodiments, self.action_width, width)
        self.action_positions = nn.Parameter(0.02 * torch.randn(max_positions, width))
        self.dit = VisionLanguageDiT(
            width=width,
            num_layers=num_dit_layers,
            num_heads=num_heads,
            context_width=vlm.hidden_size,
            output_width=mlp_width,
            dropout=dropout,
            text_every=None if cross_attention == "all" else text_every,
        )
        self.action_decoder = EmbodimentMLP(num_embodiments, mlp_width, mlp_width, head.output_width)
        self.freeze_unused(layers=(-1,))
        self.apply_freeze()

    def compute_loss(
        self,
        batch: Batch,
        *,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        drop_state: Bool[Tensor, " b"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """All numbers of the actions count alike: a sample of a robot with more of them weighs more."""
        actions = self.pad(self.clipped("action", self.normalized_actions(batch)), self.action_width)
        real = functional.pad(self.real_actions(batch), (0, self.action_width - self.spec.action_dim))
        condition = self.condition(batch.observation, drop_state=drop_state)
        per_sample = self.head.loss(self.denoise, condition, actions, real, noise=noise, time=time)
        return reduce(per_sample, rearrange(real, "b k a -> b (k a)")), {}

    def sample_actions(
        self,
        observation: Observation,
        *,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
    ) -> Float[Tensor, "b k a"]:
        condition = self.condition(observation)
        condition = replace(condition, read=self.dit.read(condition.sights))
        shape = (observation.batch_size, self.horizon, self.action_width)
        actions = self.head.sample(
            self.denoise, condition, shape, noise=noise, num_steps=num_steps, guidance=guidance
        )
        actions = self.clipped("action", actions[..., : self.spec.action_dim])
        return self.physical_actions(actions, observation)

    def condition(
        self, observation: Observation, *, drop_state: Bool[Tensor, " b"] | None = None
    ) -> Condition:
        """What the denoiser reads: computed once, whatever the number of steps."""
        observation = self.prepare(observation)
        assert self.vlm is not None
        if self.picture_size is not None:
            cut = {
                name: squeezed(image, self.picture_size, self.picture_crop)
                for name, image in observation.images.items()
            }
            observation = replace(observation, images=cut)
        context = self.vlm(observation, layers=(-1,))
        pictures = context.pictures
        if pictures is None:
            if self.cross_attention == "text_and_pictures":
                raise LibrobotError(
                    f"framework.cross_attention=text_and_pictures needs to know which tokens are pictures, "
                    f"which {type(self.vlm).__name__} does not say; take framework.cross_attention=all"
                )
            pictures = torch.zeros_like(context.mask)
        tokens = self.vision_language_norm(context.hidden.to(self.compute_dtype))
        tokens = self.fusion(tokens, None if self.see_padding else context.mask)
        sights = Sights(tokens, context.mask & ~pictures, context.mask & pictures)
        if self.see_padding and self.cross_attention == "all":
            sights = Sights(tokens, None, None)
        slots: Slots = self.slot_of_robot[0]
        if len(self.embodiments) > 1:
            slots = self.slot_table[self.embodiment_ids(observation)]
        state = self.pad(self.clipped("state", self.normalized_state(observation)), self.state_width)
        return Condition(sights, context.mask, state, self.embed_state(state, slots, drop_state), slots)

    def embed_state(
        self, state: Float[Tensor, "b t s"], slots: Slots, drop: Bool[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """All observed states as one token, hidden from `drop` (drawn in training with `state_dropout`)."""
        if self.state_encoder is None:
            return state.new_zeros(len(state), 0, self.action_positions.shape[1])
        token = self.state_encoder(rearrange(state, "b t s -> b 1 (t s)"), slots)
        if drop is None and self.training and self.state_dropout:
            lots = replicas.draw(lambda n: torch.rand(n, device=state.device), len(state))
            drop = lots < self.state_dropout
        if drop is None:
            return token
        hidden = torch.zeros_like(token) if self.dropped_state is None else self.dropped_state.to(token)
        return torch.where(drop[:, None, None], hidden, token)

    def denoise(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b k o"]:
        # A time such as 1 - 0.9 lies a rounding error below its bucket's edge.
        step = (time.float() * self.num_time_buckets + 1e-3).long()
        actions = repeat(self.action_positions[: self.horizon], "k d -> b k d", b=len(x_t))
        if self.action_encoder is not None:
            actions = actions + self.action_encoder(x_t, step, condition.slots)
        suffix = [condition.state_token, actions]
        if self.future_tokens is not None:
            suffix.insert(1, repeat(self.future_tokens, "n d -> b n d", b=len(x_t)))
        out = self.dit(torch.cat(suffix, dim=1), step, condition.sights, condition.read)
        return self.action_decoder(out[:, -self.horizon :], condition.slots)

    def prompt_writer(self) -> PromptWriter | None:
        return FormalPrompt() if self.formalize_language else None

    @property
    def processor(self) -> ObservationProcessor | None:
        made = super().processor
        if made is None or self.picture_size is None:
            return made
        return replace(made, processor=SizedProcessor(made.processor, self.picture_size))

    def clipped(self, key: str, x: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
        return x.clamp(-1.0, 1.0) if key in self.bounded else x

    @staticmethod
    def pad(x: Float[Tensor, "b n m"], width: int) -> Float[Tensor, "b n width"]:
        """Zeros up to the model's own number of dimensions."""
        return functional.pad(x, (0, width - x.shape[-1]))

    def _slots(self, slots: Sequence[int] | None, count: int) -> list[int]:
        """Each robot's set of weights. Raises ValueError where there are not enough, or not one for each."""
        found = list(range(len(self.embodiments))) if slots is None else list(slots)
        if len(found) != len(self.embodiments) or min(found) < 0 or max(found) >= count:
            raise ValueError(
                f"slots must hold one number from 0 to {count - 1} (num_embodiments={count}) for each of "
                f"{len(self.embodiments)} robots, found {found}"
            )
        return found
