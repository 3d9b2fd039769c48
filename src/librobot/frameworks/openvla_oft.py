"""OpenVLA-OFT: all actions of a chunk in one pass of the language model (Kim et al. 2025, arXiv 2502.19645).

    prefix    pictures, the state as one token, "In: What action should the robot take to ...?\\nOut:"
    slots     a token for each dimension of each action: zeros, told apart by their positions alone
    stop      the end of the text

There is no causal mask: all of these tokens see each other. The last hidden state that stands before each
slot (as in predicting the next token) speaks for it; those of an action, side by side, pass a residual MLP,
whose output is the action (L1) or the noise (diffusion). With noise, slots are its projected numbers, and
the diffusion step is one more token behind the state.

`attention` joint is the published model's: the prefix is run anew with the slots, which it sees. `behind`
runs the prefix once, as the backbone was trained, and puts state, step, slots and stop behind it: any
backbone with a cache can do that, and only slots are computed at each of a sampler's steps.
FiLM in the vision transformers (OFT+) is the backbone's option: vlm=prismatic vlm.film=true.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from librobot.frameworks.base import Framework, OptimizerFactory, SchedulerFactory
from librobot.frameworks.language_decoder import writing_vlm
from librobot.frameworks.openvla import Question
from librobot.frameworks.picture_crop import Acting, PictureCrop
from librobot.heads.base import ActionHead
from librobot.losses import reduce
from librobot.networks.oft import ResidualMLP
from librobot.nn.pooling import situation
from librobot.normalize import NormalizationMode
from librobot.types import Batch, Observation, RobotSpec
from librobot.vlms.base import VLM, Context

Attend = Literal["auto", "joint", "behind"]


@dataclass
class Prefix:
    """What the slots see: a context computed before (`behind`), or the embeddings `x` (`joint`), of which
    those from `end_of_pictures` on are the prompt's. `state` is the state's token, or has none."""

    context: Context
    state: Float[Tensor, "b n d"]
    features: Float[Tensor, "b f"]
    x: Float[Tensor, "b l d"] | None = None
    mask: Bool[Tensor, "b l"] | None = None
    end_of_pictures: int = 0

    def dropped(self, rows: Bool[Tensor, " b"]) -> Prefix:
        """Without pictures and instruction in those samples; the state stays."""
        context = replace(self.context, mask=self.context.mask & ~rows[:, None])
        mask = None if self.mask is None else self.mask & ~rows[:, None]
        return replace(self, context=context, mask=mask)


class OpenVLAOFT(Framework):
    needs_cache = True
    denoiser_parts = ("action_mlp", "noise_proj")

    def __init__(
        self,
        *,
        spec: RobotSpec,
        vlm: VLM,
        head: ActionHead,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        horizon: int = 8,
        obs_steps: int = 1,
        normalization: Mapping[str, NormalizationMode],
        freeze: Sequence[str] = (),
        lr_multipliers: Mapping[str, float] | None = None,
        embodiments: Sequence[RobotSpec] | None = None,
        attention: Attend = "auto",
        proprioception: bool = True,
        normalize_gripper: bool = False,
        crop: float | None = 0.9,
        acting_crop: Acting = "auto",
        num_blocks: int = 2,
        head_width: int | None = None,
    ) -> None:
        if attention not in get_args(Attend):
            raise ValueError(f"attention must be one of {', '.join(get_args(Attend))}, found {attention!r}")
        super().__init__(
            spec=spec,
            vlm=writing_vlm(vlm, "framework=openvla_oft"),
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
        can_join = hasattr(vlm, "embed_prefix")
        if attention == "joint" and not can_join:
            raise ValueError(
                f"attention=joint needs a backbone that gives its embeddings, such as vlm=prismatic, found "
                f"{type(vlm).__name__}; take framework.attention=behind"
            )
        self.joint = can_join if attention == "auto" else attention == "joint"
        self.crop = PictureCrop(crop, acting_crop)
        if not normalize_gripper:
            self.normalizer.leave("action", self.robots.actions_of_kind("gripper"))
        width = vlm.hidden_size
        self.proprio_proj: nn.Sequential | None = None
        if proprioception and spec.state_dim:
            self.proprio_proj = nn.Sequential(
                nn.Linear(obs_steps * spec.state_dim, width), nn.GELU(), nn.Linear(width, width)
            )
        self.noise_proj: nn.Sequential | None = None
        if head.generative:
            self.noise_proj = nn.Sequential(nn.Linear(1, width), nn.GELU(), nn.Linear(width, width))
        self.action_mlp = ResidualMLP(
            spec.action_dim * width, head.output_width, width=head_width or width, num_blocks=num_blocks
        )
        self.freeze_unused(layers=(-1,))
        self.apply_freeze()

    def compute_loss(
        self, batch: Batch, *, noise: Tensor | None = None, time: Tensor | None = None
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        prefix = self.prefix(batch.observation)
        actions, mask = self.normalized_actions(batch), self.real_actions(batch)
        per_sample = self.head.loss(self.denoise, prefix, actions, mask, noise=noise, time=time)
        return reduce(per_sample, batch.action_mask), {}

    def sample_actions(
        self,
        observation: Observation,
        *,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
    ) -> Float[Tensor, "b k a"]:
        shape = (observation.batch_size, self.horizon, self.action_width)
        prefix = self.prefix(observation)
        actions = self.head.sample(
            self.denoise, prefix, shape, noise=noise, num_steps=num_steps, guidance=guidance
        )
        return self.physical_actions(actions, observation)

    def prefix(self, observation: Observation) -> Prefix:
        observation = self.crop(self.prepare(observation), training=self.training)
        vlm: Any = self.vlm
        state = self.normalized_state(observation)
        token = vlm.embed_tokens(torch.zeros(len(state), 0, dtype=torch.long, device=state.device))
        if self.proprio_proj is not None:
            token = self.proprio_proj(rearrange(state, "b t s -> b 1 (t s)")).to(token)
        if self.joint:
            x, mask, end = vlm.embed_prefix(observation)
            return Prefix(nothing(vlm, x), token, situation(x, mask, state), x, mask, end)
        context = vlm(observation, layers=())
        return Prefix(context, token, situation(context.hidden, context.mask, state))

    def denoise(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], prefix: Prefix
    ) -> Float[Tensor, "b k o"]:
        vlm = self.vlm
        assert vlm is not None
        space, stop = (
            vlm.embed_tokens(torch.full((len(x_t), 1), id, device=x_t.device))
            for id in (vlm.vocabulary.space, vlm.vocabulary.end)
        )
        extra = [prefix.state.to(space)]
        slots = space.new_zeros(len(x_t), x_t[0].numel(), vlm.hidden_size)
        if self.noise_proj is not None:
            numbers = rearrange(x_t, "b k a -> b (k a) 1").to(self.compute_dtype)
            slots = self.noise_proj(numbers).to(space)
            extra.append(self.step_embedding(time).to(space)[:, None])
        tail = torch.cat((space, slots, stop), dim=1)
        if prefix.x is None or prefix.mask is None:
            parts = [*extra, tail]
            real = None
        else:
            pictures, prompt = prefix.x[:, : prefix.end_of_pictures], prefix.x[:, prefix.end_of_pictures :]
            parts = [pictures, *extra, prompt, tail]
            one = torch.ones_like(prefix.mask[:, :1])
            seen, asked = (
                prefix.mask[:, : prefix.end_of_pictures],
                prefix.mask[:, prefix.end_of_pictures :],
            )
            num_extra = sum(part.shape[1] for part in extra)
            real = torch.cat((seen, one.expand(-1, num_extra), asked, one.expand(-1, tail.shape[1])), dim=1)
        x = torch.cat(parts, dim=1)
        everyone = torch.ones(1, x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        hidden = vlm.extend(prefix.context, x, sees=everyone, real=real).hidden
        speaking = hidden[:, -tail.shape[1] : -2]  # from the space on: what stands before each slot
        speaking = rearrange(speaking, "b (k a) d -> b k (a d)", k=self.horizon)
        return self.action_mlp(speaking.to(self.compute_dtype))

    def step_embedding(self, time: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Sines, then cosines, of the number of the diffusion step (0 is the cleanest)."""
        assert self.vlm is not None
        step = time.float() * getattr(self.head, "num_train_steps", 50) - 1
        half = self.vlm.hidden_size // 2
        rates = torch.exp(torch.arange(half, device=time.device) * -math.log(10_000) / (half - 1))
        angles = step[:, None] * rates
        return torch.cat((angles.sin(), angles.cos()), dim=-1)

    def prompt_writer(self) -> Question:
        return Question()


def nothing(vlm: VLM, x: Float[Tensor, "b l d"]) -> Context:
    """A context without tokens, for all of them to follow."""
    shape = (len(x), vlm.geometry.num_kv_heads, 0, vlm.geometry.head_dim)
    empty = tuple(x.new_zeros(shape) for _ in range(vlm.geometry.num_layers))
    return Context(
        hidden=x[:, :0],
        layers=(),
        keys=empty,
        values=empty,
        mask=torch.zeros(len(x), 0, dtype=torch.bool, device=x.device),
        next_position=torch.zeros(len(x), dtype=torch.long, device=x.device),
    )
