"""SmolVLA: a small vision-language-action model (Shukor et al. 2025, arXiv 2506.01844; lerobot's `smolvla`).

    prefix    pictures and instruction, which see each other, then the state as one token that sees them all:
              the backbone, whose layers keep keys and values
    suffix    one token per action, made of the noisy action and the time

The action expert is a second, narrower transformer with the backbone's number of layers and heads. It
interleaves two kinds of attention: in every `self_attention_every`-th layer, from the first on, its tokens
attend to the backbone's keys and values beside their own, each to the actions up to itself; in the layers
between, they attend to the prefix alone, through projections of the backbone's keys and values, and count
their positions from 0. Prefix tokens never see the suffix, so the prefix and its projections are computed
once for all sampling steps.

The backbone is whatever `vlm=` names, as long as it keeps a cache; `vlm=smolvla` is the paper's. `head=` is
flow matching in the paper. A deterministic head has no noisy actions to embed: every action token then starts
from one learned vector and is told apart by its position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from librobot.frameworks.base import Framework, OptimizerFactory, SchedulerFactory
from librobot.heads.base import ActionHead
from librobot.losses import reduce
from librobot.nn.attention import Angles, Attention, GatedMLP
from librobot.nn.masks import causal
from librobot.nn.pooling import situation
from librobot.nn.positions import rotary_angles, time_embedding
from librobot.normalize import NormalizationMode
from librobot.types import Batch, Observation, RobotSpec
from librobot.vlms.base import VLM, Context, Geometry

NORM_EPS = 1e-5  # SmolLM2's

Cache = tuple[Float[Tensor, "b h l e"], Float[Tensor, "b h l e"]]
"""Keys and values of one layer."""


@dataclass
class Condition:
    """What the denoiser needs beside the noisy actions: the cached prefix, the state's token included, what
    was `seen` before it, and the normalised state."""

    prefix: Context
    seen: Context
    state: Float[Tensor, "b t s"]
    known: dict[tuple[int, bool], list[Cache]] = field(default_factory=dict)

    @property
    def features(self) -> Float[Tensor, "b f"]:
        """What tells situations apart, for a coupling of noise and actions."""
        return situation(self.seen.hidden, self.seen.mask, self.state)

    def read_by(self, expert: nn.ModuleList) -> list[Cache]:
        """What each layer of the expert reads of the prefix: computed once for all sampling steps, and apart
        for a teacher's expert, and for one that learns."""
        key = id(expert), torch.is_grad_enabled()
        if key not in self.known:
            layers: Any = zip(expert, self.prefix.keys, self.prefix.values, strict=True)
            self.known[key] = [block.reads(keys, values) for block, keys, values in layers]
        return self.known[key]


class ExpertBlock(nn.Module):
    """One layer of the action expert: Llama's block. `cross` says which of the two kinds of attention."""

    def __init__(self, width: int, mlp_width: int, geometry: Geometry, *, cross: bool) -> None:
        super().__init__()
        self.cross = cross
        self.attention_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.attention = Attention(width, geometry.num_heads, geometry.num_kv_heads, geometry.head_dim)
        if cross:
            kept = geometry.num_kv_heads * geometry.head_dim
            self.attention.k_proj = nn.Linear(kept, kept, bias=False)
            self.attention.v_proj = nn.Linear(kept, kept, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.mlp = GatedMLP(width, mlp_width)

    def reads(self, keys: Float[Tensor, "b h l e"], values: Float[Tensor, "b h l e"]) -> Cache:
        """What this layer reads of the backbone's cache."""
        keys, values = (x.to(self.mlp_norm.weight.dtype) for x in (keys, values))
        if not self.cross:
            return keys, values
        keys, values = (rearrange(x, "b h l e -> b l (h e)") for x in (keys, values))
        keys, values = self.attention.k_proj(keys), self.attention.v_proj(values)
        e = self.attention.head_dim
        return rearrange(keys, "b l (h e) -> b h l e", e=e), rearrange(values, "b l (h e) -> b h l e", e=e)

    def forward(
        self,
        x: Float[Tensor, "b k d"],
        angles: Angles,
        keys: Float[Tensor, "b h l e"],
        values: Float[Tensor, "b h l e"],
        mask: Bool[Tensor, "b k m"],
    ) -> Float[Tensor, "b k d"]:
        normed = self.attention_norm(x)
        if not self.cross:
            own = self.attention.keys_values(normed, angles)
            keys, values = torch.cat((keys, own[0]), dim=2), torch.cat((values, own[1]), dim=2)
        x = x + self.attention(normed, angles, keys, values, mask)
        return x + self.mlp(self.mlp_norm(x))


class SmolVLA(Framework):
    denoiser_parts = ("expert", "expert_norm", "action_in_proj", "action_time_mlp", "action_out_proj")
    needs_cache = True
    block_lists = ("expert",)

    def __init__(
        self,
        *,
        spec: RobotSpec,
        vlm: VLM,
        head: ActionHead,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        horizon: int = 50,
        obs_steps: int = 1,
        normalization: Mapping[str, NormalizationMode],
        freeze: Sequence[str] = (),
        lr_multipliers: Mapping[str, float] | None = None,
        max_state_dim: int | None = 32,
        max_action_dim: int | None = 32,
        expert_width_share: float = 0.75,
        expert_mlp_width: int | None = None,
        self_attention_every: int = 2,
        embodiments: Sequence[RobotSpec] | None = None,
    ) -> None:
        for name, value, needed in (
            ("max_state_dim", max_state_dim, spec.state_dim),
            ("max_action_dim", max_action_dim, spec.action_dim),
        ):
            if value is not None and value < needed:
                raise ValueError(f"{name} must be at least {needed} for robot {spec.name!r}, found {value}")
        if not vlm.has_cache:
            raise ValueError(
                f"the expert reads a backbone's cache of keys and values, and {type(vlm).__name__} has none; "
                f"take vlm=smolvla or another decoder, or framework=pi0"
            )
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
        self.geometry = vlm.geometry
        self.width = width = int(expert_width_share * vlm.hidden_size)
        mlp_width = llama_mlp_width(width) if expert_mlp_width is None else expert_mlp_width
        self.expert = nn.ModuleList(
            ExpertBlock(
                width, mlp_width, vlm.geometry, cross=not uses_self_attention(i, self_attention_every)
            )
            for i in range(vlm.geometry.num_layers)
        )
        self.expert_norm = nn.RMSNorm(width, eps=NORM_EPS)
        if self.state_width:
            self.state_proj = nn.Linear(self.state_width, vlm.hidden_size)
        if head.generative:
            self.action_in_proj = nn.Linear(self.action_width, width)
            self.action_time_mlp = nn.Sequential(
                nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width)
            )
        else:
            self.action_token = nn.Parameter(torch.randn(width))
        self.action_out_proj = nn.Linear(width, head.output_width)
        self.freeze_unused(layers=())
        self.apply_freeze()

    def compute_loss(
        self, batch: Batch, *, noise: Tensor | None = None, time: Tensor | None = None
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        actions = pad(self.normalized_actions(batch), self.action_width)
        # Padded dimensions are noised and denoised, but their error does not count.
        real = functional.pad(self.real_actions(batch), (0, self.action_width - self.spec.action_dim))
        condition = self.condition(batch.observation)
        per_sample = self.head.loss(self.denoise, condition, actions, real, noise=noise, time=time)
        return reduce(per_sample, batch.action_mask), {}

    def sample_actions(
        self,
        observation: Observation,
        *,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
    ) -> Float[Tensor, "b k a"]:
        condition = self.condition(observation)
        shape = (observation.batch_size, self.horizon, self.action_width)
        actions = self.head.sample(
            self.denoise, condition, shape, noise=noise, num_steps=num_steps, guidance=guidance
        )
        return self.physical_actions(actions[..., : self.spec.action_dim], observation)

    def condition(self, observation: Observation) -> Condition:
        """Run the prefix once: pictures and instruction, then the state; `denoise` reads it at every step."""
        observation = self.prepare(observation)
        assert self.vlm is not None
        state = self.normalized_state(observation)
        seen = prefix = self.vlm(observation, layers=())
        if self.state_width:
            token = self.state_proj(pad(state, self.state_width))
            prefix = self.vlm.extend(seen, token.to(seen.hidden.dtype))
        return Condition(prefix, seen, state)

    def denoise(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b k o"]:
        x = self.embed_suffix(x_t, time)
        prefix = condition.prefix
        order = torch.arange(self.horizon, device=x.device)[None]
        e, theta = self.geometry.head_dim, self.geometry.rope_theta
        # Behind the prefix where the actions attend to each other, from 0 where they only read the prefix.
        behind = rotary_angles(prefix.next_position[:, None] + order, e, theta)
        from_zero = rotary_angles(order, e, theta)
        before = repeat(prefix.mask, "b l -> b k l", k=self.horizon)
        among = causal(order, order).expand(len(x), -1, -1)
        both = torch.cat((before, among), dim=2)
        for block, (keys, values) in zip(self.expert, condition.read_by(self.expert), strict=True):
            angles, mask = (from_zero, before) if block.cross else (behind, both)
            x = block(x, angles, keys, values, mask)
        return self.action_out_proj(self.expert_norm(x))

    def embed_suffix(self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"]) -> Float[Tensor, "b k d"]:
        """A token for each action."""
        if not self.head.generative:
            return self.action_token.expand(len(x_t), self.horizon, self.width)
        dtype = self.compute_dtype
        embedded = repeat(time_embedding(time, self.width).to(dtype), "b d -> b k d", k=self.horizon)
        return self.action_time_mlp(torch.cat((self.action_in_proj(x_t.to(dtype)), embedded), dim=-1))


def uses_self_attention(index: int, every: int) -> bool:
    """Whether the expert's layer of this number attends to its own tokens too (`every` 0: none does)."""
    return every > 0 and index % every == 0


def llama_mlp_width(width: int, multiple: int = 256) -> int:
    """Two thirds of four times the width, rounded up to a multiple (Touvron et al. 2023)."""
    return -(-4 * int(2 * width / 3) // multiple) * multiple


def pad(x: Float[Tensor, "b n m"], width: int) -> Float[Tensor, "b n width"]:
    """Zeros up to the model's own number of dimensions."""
    return functional.pad(x, (0, width - x.shape[-1]))
