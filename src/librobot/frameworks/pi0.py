"""pi0: a vision-language-action flow model (Black et al. 2024, arXiv 2410.24164; openpi `models/pi0.py`).

    prefix    images and instruction, attending to each other: the backbone, whose layers keep keys and values
    suffix    one state token, then one token per action; each attends to all earlier blocks and to its own

The action expert is a second, narrower transformer with the backbone's number of layers and heads. In layer
i its tokens attend to the backbone's keys and values of layer i beside their own; prefix tokens never see
them, so the prefix runs once for all sampling steps. A backbone without a cache (an encoder-decoder) gives
hidden states, from which learned projections make keys and values for each of the expert's layers.

The backbone is whatever `vlm=` names; PaliGemma is the paper's. `head=` is flow matching in the paper; any
other fits. A deterministic head has no noisy actions to embed: every action token then starts from one
learned vector and is told apart by its position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from librobot.frameworks.base import Framework, OptimizerFactory, SchedulerFactory
from librobot.heads.base import ActionHead
from librobot.losses import reduce
from librobot.nn.attention import Attention, GatedMLP, block_mask
from librobot.nn.learned_cache import LearnedCache
from librobot.nn.norms import GemmaRMSNorm
from librobot.nn.pooling import situation
from librobot.nn.positions import rotary_angles, time_embedding
from librobot.normalize import NormalizationMode
from librobot.types import Batch, Observation, RobotSpec
from librobot.vlms.base import VLM, Context, Geometry

PREFIX, STATE, ACTIONS = 0, 1, 2  # attention blocks: each sees itself and the earlier ones


@dataclass
class Condition:
    """What the denoiser needs beside the noisy actions: the cached prefix, and the normalised state."""

    prefix: Context
    state: Float[Tensor, "b t s"]

    @property
    def features(self) -> Float[Tensor, "b f"]:
        """What tells situations apart, for a coupling of noise and actions."""
        return situation(self.prefix.hidden, self.prefix.mask, self.state)

    def dropped(self, rows: Bool[Tensor, " b"]) -> Condition:
        """Without pictures and instruction in those samples; the state stays."""
        return replace(self, prefix=replace(self.prefix, mask=self.prefix.mask & ~rows[:, None]))


class ExpertBlock(nn.Module):
    """One layer of the action expert: Gemma's block, attending to the backbone's cache as well."""

    def __init__(self, width: int, mlp_width: int, geometry: Geometry) -> None:
        super().__init__()
        self.attention_norm = GemmaRMSNorm(width)
        self.attention = Attention(width, geometry.num_heads, geometry.num_kv_heads, geometry.head_dim)
        self.mlp_norm = GemmaRMSNorm(width)
        self.mlp = GatedMLP(width, mlp_width, activation="gelu")

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        angles: tuple[Tensor, Tensor],
        prefix_keys: Float[Tensor, "b h l e"],
        prefix_values: Float[Tensor, "b h l e"],
        mask: Bool[Tensor, "b q l+q"],
    ) -> Float[Tensor, "b q d"]:
        normed = self.attention_norm(x)
        keys, values = self.attention.keys_values(normed, angles)
        keys = torch.cat((prefix_keys.to(keys), keys), dim=2)
        values = torch.cat((prefix_values.to(values), values), dim=2)
        x = x + self.attention(normed, angles, keys, values, mask)
        return x + self.mlp(self.mlp_norm(x))


class Pi0(Framework):
    denoiser_parts = (
        "expert", "expert_norm", "state_proj", "action_in_proj", "action_time_mlp", "action_out_proj",
    )  # fmt: skip

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
        expert_width: int | None = None,
        expert_mlp_ratio: int = 4,
        embodiments: Sequence[RobotSpec] | None = None,
    ) -> None:
        for name, value, needed in (
            ("max_state_dim", max_state_dim, spec.state_dim),
            ("max_action_dim", max_action_dim, spec.action_dim),
        ):
            if value is not None and value < needed:
                raise ValueError(f"{name} must be at least {needed} for robot {spec.name!r}, found {value}")
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
        self.num_state_tokens = obs_steps if self.state_width else 0
        self.geometry = vlm.geometry
        width = vlm.hidden_size // 2 if expert_width is None else expert_width
        self.width = width

        self.expert = nn.ModuleList(
            ExpertBlock(width, expert_mlp_ratio * width, vlm.geometry) for _ in range(vlm.geometry.num_layers)
        )
        self.expert_norm = GemmaRMSNorm(width)
        if self.num_state_tokens:
            self.state_proj = nn.Linear(self.state_width, width)
        if head.generative:
            self.action_in_proj = nn.Linear(self.action_width, width)
            self.action_time_mlp = nn.Sequential(
                nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width)
            )
        else:
            self.action_token = nn.Parameter(torch.randn(width))
        self.action_out_proj = nn.Linear(width, head.output_width)
        # Only a cache's keys and values are read, so what lies behind the last layer's cannot train.
        self.prefix_layers: tuple[int, ...] = () if vlm.has_cache else (-1,)
        self.learned_cache = None
        if not vlm.has_cache:
            self.learned_cache = LearnedCache(
                vlm.hidden_size,
                num_layers=vlm.geometry.num_layers,
                num_kv_heads=vlm.geometry.num_kv_heads,
                head_dim=vlm.geometry.head_dim,
                rope_theta=vlm.geometry.rope_theta,
            )
        self.freeze_unused(layers=self.prefix_layers)
        self.apply_freeze()

    def compute_loss(
        self, batch: Batch, *, noise: Tensor | None = None, time: Tensor | None = None
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        actions = self.pad(self.normalized_actions(batch), self.action_width)
        # Padded dimensions are noised and denoised as in openpi, but their error does not count.
        mask = functional.pad(self.real_actions(batch), (0, self.action_width - self.spec.action_dim))
        condition = self.condition(batch.observation)
        per_sample = self.head.loss(self.denoise, condition, actions, mask, noise=noise, time=time)
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
        """Run the prefix once; `denoise` then reads its cache at every step."""
        observation = self.prepare(observation)
        assert self.vlm is not None
        state = self.pad(self.normalized_state(observation), self.state_width)
        prefix = self.vlm(observation, layers=self.prefix_layers)
        if self.learned_cache is not None:
            keys, values = self.learned_cache(prefix.hidden, prefix.mask)
            prefix = replace(prefix, keys=keys, values=values)
        return Condition(prefix, state)

    def denoise(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b k o"]:
        prefix = condition.prefix
        x, blocks = self.embed_suffix(x_t, time, condition.state)
        positions = prefix.next_position[:, None] + torch.arange(x.shape[1], device=x.device)
        angles = rotary_angles(positions, self.geometry.head_dim, self.geometry.rope_theta)
        key_blocks = torch.cat((torch.full_like(prefix.mask, PREFIX, dtype=torch.long), blocks), dim=1)
        key_mask = torch.cat((prefix.mask, torch.ones_like(blocks, dtype=torch.bool)), dim=1)
        mask = block_mask(blocks, key_blocks, key_mask)
        for block, keys, values in zip(self.expert, prefix.keys, prefix.values, strict=True):
            x = block(x, angles, keys, values, mask)
        return self.action_out_proj(self.expert_norm(x)[:, self.num_state_tokens :])

    def embed_suffix(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], state: Float[Tensor, "b t s"]
    ) -> tuple[Float[Tensor, "b q d"], Int[Tensor, "b q"]]:
        """State and action tokens, and the attention block of each."""
        if self.head.generative:
            embedded = repeat(time_embedding(time, self.width).to(state), "b d -> b k d", k=self.horizon)
            actions = self.action_in_proj(x_t.to(state))
            actions = self.action_time_mlp(torch.cat((actions, embedded), dim=-1))
        else:
            actions = self.action_token.expand(len(state), self.horizon, self.width)
        tokens = [self.state_proj(state), actions] if self.num_state_tokens else [actions]
        order = [STATE] * self.num_state_tokens + [ACTIONS] * self.horizon
        blocks = torch.tensor(order, device=state.device).expand(len(state), -1)
        return torch.cat(tokens, dim=1), blocks

    @staticmethod
    def pad(x: Float[Tensor, "b n m"], width: int) -> Float[Tensor, "b n width"]:
        """Zeros up to the model's own number of dimensions."""
        return functional.pad(x, (0, width - x.shape[-1]))
