"""ACT: Action Chunking with Transformers (Zhao et al. 2023, arXiv 2304.13705; code tonyzhaozh/act).

    style encoder    z ~ q(z | state, actions): transformer over [CLS, state, actions]; z = 0 at test time
    encoder          transformer over [z, state, observation tokens]
    decoder          one learned query per action attends to the encoder's output
    loss             |prediction - action| + kl_weight * KL(q(z | state, actions) || N(0, 1))

Deviations, each an option: the published code reads its decoder's first layer only (`decoder_layers_used`);
it divides the L1 by all steps, padding included (`loss_reduction`); its eyes are ResNet-18 and it reads no
language (`backbone: resnet18`), while `backbone: vlm` takes the observation tokens, instruction and all,
from `vlm=`. Its unused is-padding output is left out. With a generative head, the noisy chunk and its time
enter the decoder's input, which is zeros otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from librobot import replicas
from librobot.frameworks.base import Framework, OptimizerFactory, SchedulerFactory
from librobot.heads.base import ActionHead
from librobot.losses import gaussian_kl, reduce
from librobot.nn.detr import Decoder, Encoder, LayerOptions
from librobot.nn.pooling import situation
from librobot.nn.positions import age_embedding, sine_map, sine_table, time_embedding
from librobot.nn.resnet import IMAGENET_MEAN, IMAGENET_STD, ResNet18, Statistic
from librobot.nn.text import ByteEncoder, ByteTokenizer
from librobot.normalize import NormalizationMode
from librobot.types import Batch, Observation, RobotSpec
from librobot.vlms.base import VLM, ObservationProcessor


@dataclass
class Tokens:
    """A sequence for DETR's attention: values, what to add to queries and keys, and which are real."""

    values: Float[Tensor, "b l d"]
    positions: Float[Tensor, "#b l d"]
    mask: Bool[Tensor, "b l"]


@dataclass
class Memory(Tokens):
    """What the decoder attends to, and what it was made of."""

    seen: Tokens
    state: Float[Tensor, "b t s"]

    @property
    def features(self) -> Float[Tensor, "b f"]:
        """What tells situations apart, for a coupling of noise and actions."""
        return situation(self.seen.values, self.seen.mask, self.state)


class ACT(Framework):
    denoiser_parts = ("decoder", "queries", "noisy_action_proj", "time_mlp", "action_out_proj")
    splits_heads = True
    block_lists = ("encoder.layers", "decoder.layers", "vae_encoder.layers")

    def __init__(
        self,
        *,
        spec: RobotSpec,
        vlm: VLM,
        head: ActionHead,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        horizon: int = 100,
        obs_steps: int = 1,
        normalization: Mapping[str, NormalizationMode],
        freeze: Sequence[str] = (),
        lr_multipliers: Mapping[str, float] | None = None,
        width: int = 512,
        num_heads: int = 8,
        feedforward_width: int = 3200,
        num_encoder_layers: int = 4,
        num_decoder_layers: int = 7,
        decoder_layers_used: Literal["all", "first"] = "all",
        activation: str = "relu",
        pre_norm: bool = False,
        dropout: float = 0.1,
        use_vae: bool = True,
        latent_dim: int = 32,
        num_vae_layers: int = 4,
        kl_weight: float = 10.0,
        loss_reduction: Literal["masked", "original"] = "masked",
        backbone: Literal["vlm", "resnet18"] = "vlm",
        pretrained: bool | str = False,
        picture_mean: Statistic = IMAGENET_MEAN,
        picture_std: Statistic = IMAGENET_STD,
        instruction_token: bool = False,
        max_prompt_tokens: int = 96,
        embodiments: Sequence[RobotSpec] | None = None,
    ) -> None:
        for name, value, options in (
            ("decoder_layers_used", decoder_layers_used, ("all", "first")),
            ("loss_reduction", loss_reduction, ("masked", "original")),
            ("backbone", backbone, ("vlm", "resnet18")),
        ):
            if value not in options:
                raise ValueError(f"{name} must be one of {options}, found {value!r}")
        if backbone == "vlm" and (pretrained or instruction_token):
            raise ValueError(
                "pretrained and instruction_token belong to backbone=resnet18; with backbone=vlm the weights "
                "and the instruction come from vlm="
            )
        super().__init__(
            spec=spec,
            vlm=vlm if backbone == "vlm" else None,
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
        self.loss_reduction = loss_reduction
        self.kl_weight = kl_weight
        self.latent_dim = latent_dim
        layer = LayerOptions(width, num_heads, feedforward_width, dropout, activation, pre_norm)

        # Observation tokens.
        self.tokenizer = ByteTokenizer(max_prompt_tokens) if instruction_token else None
        if self.vlm is None:
            self.resnet = ResNet18(pretrained, mean=picture_mean, std=picture_std)
        # Of a feature map this is the published code's 1 x 1 convolution.
        self.observation_proj = nn.Linear(self.vlm.hidden_size if self.vlm else ResNet18.channels, width)
        if instruction_token:
            self.instruction_encoder = ByteEncoder(width)
        state_width = obs_steps * spec.state_dim
        self.has_state = state_width > 0
        self.num_plain_tokens = 1 + self.has_state + instruction_token
        self.plain_positions = nn.Embedding(self.num_plain_tokens, width)
        if self.has_state:
            self.state_proj = nn.Linear(state_width, width)
        self.latent_proj = nn.Linear(latent_dim, width)
        self.encoder = Encoder(num_encoder_layers, layer)

        # Decoder. The published code computes seven layers and reads the first: one layer gives the same.
        self.decoder = Decoder(num_decoder_layers if decoder_layers_used == "all" else 1, layer)
        self.queries = nn.Embedding(horizon, width)
        self.action_out_proj = nn.Linear(width, head.output_width)
        if head.generative:
            self.noisy_action_proj = nn.Linear(spec.action_dim, width)
            self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

        # Style encoder: q(z | state, actions).
        self.vae_encoder = Encoder(num_vae_layers, layer) if use_vae else None
        if use_vae:
            self.vae_cls = nn.Embedding(1, width)
            if self.has_state:
                self.vae_state_proj = nn.Linear(state_width, width)
            self.vae_action_proj = nn.Linear(spec.action_dim, width)
            self.vae_out_proj = nn.Linear(width, 2 * latent_dim)
            length = 1 + self.has_state + horizon
            self.register_buffer("vae_positions", sine_table(length, width)[None], persistent=False)
        self.freeze_unused(layers=(-1,))
        self.apply_freeze()

    def compute_loss(
        self,
        batch: Batch,
        *,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        latent_noise: Float[Tensor, "b z"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        observation = self.prepare(batch.observation)
        state = self.normalized_state(observation)
        actions = self.normalized_actions(batch)
        latent, kl = self.encode_style(state, actions, batch.action_mask, latent_noise)
        memory = self.encode(observation, state, latent)
        real = self.real_actions(batch)
        per_sample = self.head.loss(self.denoise, memory, actions, real, noise=noise, time=time)
        action_loss = reduce(per_sample, batch.action_mask, self.loss_reduction)
        loss = action_loss + self.kl_weight * kl
        return loss, {"action_loss": action_loss.detach(), "kl": kl.detach()}

    def sample_actions(
        self,
        observation: Observation,
        *,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
    ) -> Float[Tensor, "b k a"]:
        observation = self.prepare(observation)
        state = self.normalized_state(observation)
        memory = self.encode(observation, state, state.new_zeros(len(state), self.latent_dim))
        shape = (len(state), self.horizon, self.spec.action_dim)
        actions = self.head.sample(
            self.denoise, memory, shape, noise=noise, num_steps=num_steps, guidance=guidance
        )
        return self.physical_actions(actions, observation)

    @property
    def processor(self) -> ObservationProcessor | None:
        if self.tokenizer is None:
            return super().processor
        return ObservationProcessor(self.tokenizer, self.spec.camera_names)

    def encode_style(
        self,
        state: Float[Tensor, "b t s"],
        actions: Float[Tensor, "b k a"],
        mask: Bool[Tensor, "b k"],
        noise: Float[Tensor, "b z"] | None,
    ) -> tuple[Float[Tensor, "b z"], Float[Tensor, ""]]:
        """A reparameterised draw of z, and the KL's mean over the batch (z = 0 and no KL without the VAE)."""
        if self.vae_encoder is None:
            return state.new_zeros(len(state), self.latent_dim), state.new_zeros(())
        tokens = [repeat(self.vae_cls.weight, "one d -> b one d", b=len(state))]
        if self.has_state:
            tokens.append(self.vae_state_proj(rearrange(state, "b t s -> b 1 (t s)")))
        visible = mask.unsqueeze(-1)
        tokens.append(self.vae_action_proj(actions.masked_fill(~visible, 0.0)))
        real = mask.new_ones(len(mask), len(tokens) - 1)
        x = self.vae_encoder(torch.cat(tokens, dim=1), self.vae_positions, torch.cat((real, mask), dim=1))
        mean, log_variance = self.vae_out_proj(x[:, 0]).chunk(2, dim=-1)
        noise = replicas.randn_like(mean) if noise is None else noise
        return mean + (0.5 * log_variance).exp() * noise, gaussian_kl(mean, log_variance).mean()

    def encode(
        self, observation: Observation, state: Float[Tensor, "b t s"], latent: Float[Tensor, "b z"]
    ) -> Memory:
        """The encoder over [z, state, observation tokens]: what the decoder attends to."""
        plain = [self.latent_proj(latent)]
        if self.has_state:
            plain.append(self.state_proj(rearrange(state, "b t s -> b (t s)")))
        if self.tokenizer is not None:
            assert observation.inputs is not None
            plain.append(
                self.instruction_encoder(observation.inputs["tokens"], observation.inputs["token_mask"])
            )
        seen = self.observation_tokens(observation)
        values = torch.cat((torch.stack(plain, dim=1), seen.values), dim=1)
        positions = repeat(self.plain_positions.weight, "l d -> b l d", b=len(seen.positions))
        positions = torch.cat((positions, seen.positions), dim=1)
        mask = torch.cat((seen.mask.new_ones(len(state), len(plain)), seen.mask), dim=1)
        return Memory(self.encoder(values, positions, mask), positions, mask, seen, state)

    def observation_tokens(self, observation: Observation) -> Tokens:
        if self.vlm is not None:
            # The backbone's hidden states carry their own positions.
            context = self.vlm(observation)
            values = self.observation_proj(context.hidden.to(self.compute_dtype))
            return Tokens(values, torch.zeros_like(values[:1]), context.mask)
        cameras = [self._camera_tokens(observation, name) for name in observation.images]
        return Tokens(
            torch.cat([tokens.values for tokens in cameras], dim=1),
            torch.cat([tokens.positions for tokens in cameras], dim=1),
            torch.cat([tokens.mask for tokens in cameras], dim=1),
        )

    def denoise(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], memory: Memory
    ) -> Float[Tensor, "b k o"]:
        """The decoder: the chunk for a deterministic head, one denoising step for a generative one."""
        x = memory.values.new_zeros(len(x_t), self.horizon, self.width)
        if self.head.generative:
            embedded = time_embedding(time, self.width).to(memory.values)
            x = self.noisy_action_proj(x_t.to(memory.values)) + self.time_mlp(embedded)[:, None]
        x = self.decoder(x, self.queries.weight, memory.values, memory.positions, memory.mask)
        return self.action_out_proj(x)

    def _camera_tokens(self, observation: Observation, name: str) -> Tokens:
        """One camera's feature map, position by position. All cameras share the network, and, as in the
        published code, the positions: it lays feature maps side by side, but numbers each from its own
        edge."""
        pixels = observation.images[name]
        t = pixels.shape[1]
        pixels = rearrange(pixels, "b t c h w -> (b t) c h w").to(self.compute_dtype)
        camera = list(observation.images).index(name)
        features = self.observation_proj(rearrange(self.resnet(pixels, camera), "m d h w -> m h w d"))
        positions = sine_map(features.shape[1], features.shape[2], self.width).to(features)
        positions = positions + age_embedding(t, self.width).to(features)[:, None, None]
        values = rearrange(features, "(b t) h w d -> b (t h w) d", t=t)
        mask = repeat(observation.image_mask[name], "b -> b l", l=values.shape[1])
        return Tokens(values, rearrange(positions, "t h w d -> 1 (t h w) d"), mask)
