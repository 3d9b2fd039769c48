"""Diffusion Policy (Chi et al. 2023, arXiv 2303.04137; code real-stanford/diffusion_policy).

    observation   ResNet-18 with group norm and spatial softmax, camera by camera and step by step, beside the
                  state: O_t, of the last `obs_steps` steps
    denoiser      eps(O_t, A_t + eps_k, k): a U-Net over the chunk's steps, conditioned by FiLM, or a causal
                  transformer (`denoiser: transformer`)
    chunk         `horizon` actions that begin at the first observation step, obs_steps - 1 before the current
                  one; `sample_actions` gives those from the current step on

Deviations, each an option: steps past an episode's end do not count in the loss (`mask_padding`); each
picture is cropped at a place of its own, where lerobot crops a batch at one; with `backbone: vlm` learned
queries read the hidden states of `vlm=`, so that the instruction counts. With a deterministic head the
denoiser starts from a learned chunk at level 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from librobot.frameworks.base import Framework, OptimizerFactory, SchedulerFactory
from librobot.heads.base import ActionHead
from librobot.losses import reduce
from librobot.networks.unet import ConditionalUNet1D
from librobot.nn.diffusion_transformer import DiffusionTransformer
from librobot.nn.keypoint_encoder import KeypointEncoder
from librobot.nn.positions import level_embedding
from librobot.nn.readout import Readout
from librobot.nn.resnet import IMAGENET_MEAN, IMAGENET_STD, ResNet18, ResNetNorm, Statistic
from librobot.normalize import NormalizationMode
from librobot.types import Batch, Observation, RobotSpec
from librobot.vlms.base import VLM


@dataclass
class Condition:
    """O_t: normalised states, and what was seen. A backbone reads all steps at once: there is one `seen`."""

    state: Float[Tensor, "b t s"]
    seen: Float[Tensor, "b t f"] | Float[Tensor, "b 1 f"]

    @property
    def tokens(self) -> Float[Tensor, "b t e"]:
        """One for each observation step."""
        return torch.cat((self.state, self.seen.expand(-1, self.state.shape[1], -1)), dim=-1)

    @property
    def vector(self) -> Float[Tensor, "b e"]:
        """All of it side by side, step by step."""
        if self.seen.shape[1] == self.state.shape[1]:
            return self.tokens.flatten(1)
        return torch.cat((self.state.flatten(1), self.seen.flatten(1)), dim=-1)

    @property
    def features(self) -> Float[Tensor, "b e"]:
        """What tells situations apart, for a coupling of noise and actions."""
        seen = self.seen.detach().float().flatten(1)
        state = self.state.detach().float().flatten(1)
        return torch.cat((state, functional.layer_norm(seen, seen.shape[-1:])), dim=-1)

    def dropped(self, rows: Bool[Tensor, " b"]) -> Condition:
        """Nothing seen in those samples; the state stays."""
        return replace(self, seen=self.seen.masked_fill(rows[:, None, None], 0.0))


class ConditionedUNet(nn.Module):
    """The U-Net with the level's embedding and the condition as one FiLM vector."""

    def __init__(self, unet: ConditionalUNet1D, level_width: int) -> None:
        super().__init__()
        self.level_width = level_width
        self.level_mlp = nn.Sequential(
            nn.Linear(level_width, 4 * level_width), nn.Mish(), nn.Linear(4 * level_width, level_width)
        )
        self.unet = unet

    def forward(
        self, x_t: Float[Tensor, "b k a"], level: Float[Tensor, " b"], condition: Float[Tensor, "b f"]
    ) -> Float[Tensor, "b k o"]:
        embedded = self.level_mlp(level_embedding(level, self.level_width).to(condition))
        return self.unet(x_t, torch.cat((embedded, condition), dim=-1))


class DiffusionPolicy(Framework):
    denoiser_parts = ("denoiser", "queries")
    language_options: ClassVar[dict[str, str]] = {"backbone": "vlm"}

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
        normalization: Mapping[str, NormalizationMode],
        freeze: Sequence[str] = (),
        lr_multipliers: Mapping[str, float] | None = None,
        mask_padding: bool = True,
        backbone: Literal["resnet18", "vlm"] = "resnet18",
        resize: Sequence[int] | None = None,
        crop: float | Sequence[int] = 0.9,
        resnet_norm: ResNetNorm = "group",
        pretrained: bool | str = False,
        picture_mean: Statistic = IMAGENET_MEAN,
        picture_std: Statistic = IMAGENET_STD,
        num_keypoints: int = 32,
        encoder_per_camera: bool = False,
        num_readouts: int = 8,
        readout_width: int = 64,
        denoiser: Literal["unet", "transformer"] = "unet",
        level_channels: Sequence[int] = (512, 1024, 2048),
        kernel_size: int = 5,
        num_groups: int = 8,
        film_scale: bool = True,
        level_width: int = 128,
        width: int = 256,
        num_layers: int = 8,
        num_heads: int = 4,
        dropout: float = 0.3,
        embodiments: Sequence[RobotSpec] | None = None,
    ) -> None:
        for name, value, options in (
            ("backbone", backbone, ("resnet18", "vlm")),
            ("denoiser", denoiser, ("unet", "transformer")),
        ):
            if value not in options:
                raise ValueError(f"{name} must be one of {options}, found {value!r}")
        if horizon < obs_steps:
            raise ValueError(
                f"horizon must be at least obs_steps={obs_steps}, since the chunk begins at the first "
                f"observation step, found {horizon}"
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
        self.action_offset = 1 - obs_steps
        self.num_levels: int = getattr(head, "num_train_steps", 100)
        self.mask_padding = mask_padding
        self.resize = resize

        # Observation.
        if self.vlm is not None:
            self.readout = Readout(
                self.vlm.hidden_size, width=readout_width, num_queries=num_readouts, num_heads=num_heads
            )
            seen_width, seen_steps = self.readout.width, 1
        else:
            self.encoders = nn.ModuleList(
                KeypointEncoder(
                    ResNet18(pretrained, norm=resnet_norm, mean=picture_mean, std=picture_std),
                    num_keypoints=num_keypoints,
                    crop=crop,
                )
                for _ in (spec.cameras if encoder_per_camera else spec.cameras[:1])
            )
            seen_width, seen_steps = 2 * num_keypoints * len(spec.cameras), obs_steps
            self._check_pictures()

        # Denoiser.
        channels = {"channels_in": spec.action_dim, "channels_out": head.output_width}
        if denoiser == "unet":
            condition_width = level_width + obs_steps * spec.state_dim + seen_steps * seen_width
            unet = ConditionalUNet1D(
                **channels,
                condition_width=condition_width,
                level_channels=level_channels,
                kernel_size=kernel_size,
                num_groups=num_groups,
                film_scale=film_scale,
                last_groups=8,  # in the published code whatever num_groups is
            )
            self.denoiser: nn.Module = ConditionedUNet(unet, level_width)
            self.block_lists = tuple(f"denoiser.unet.{part}" for part in ("down", "middle", "up"))
        else:
            self.denoiser = DiffusionTransformer(
                **channels,
                horizon=horizon,
                condition_width=spec.state_dim + seen_width,
                num_conditions=obs_steps,
                width=width,
                num_layers=num_layers,
                num_heads=num_heads,
                dropout=dropout,
            )
            self.block_lists = ("denoiser.decoder.layers",)
        if not head.generative:
            self.queries = nn.Parameter(torch.randn(horizon, spec.action_dim))
        self.freeze_unused(layers=(-1,))
        self.apply_freeze()

    def compute_loss(
        self, batch: Batch, *, noise: Tensor | None = None, time: Tensor | None = None
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        if not self.mask_padding:
            batch = replace(batch, action_mask=torch.ones_like(batch.action_mask))
        actions = self.normalized_actions(batch)
        condition = self.condition(batch.observation)
        real = self.real_actions(batch)
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
        shape = (observation.batch_size, self.horizon, self.spec.action_dim)
        actions = self.head.sample(
            self.denoise, condition, shape, noise=noise, num_steps=num_steps, guidance=guidance
        )
        return self.physical_actions(actions[:, -self.action_offset :], observation)

    def condition(self, observation: Observation) -> Condition:
        observation = self.prepare(observation)
        state = self.normalized_state(observation)
        if self.vlm is not None:
            context = self.vlm(observation)
            return Condition(state, self.readout(context.hidden, context.mask)[:, None])
        seen = [self._see(observation, i, name) for i, name in enumerate(observation.images)]
        nothing = state.new_zeros(*state.shape[:2], 0)
        return Condition(state, torch.cat((nothing, *seen), dim=-1))

    def denoise(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b k o"]:
        """`time` is 1 at the noisiest of the levels, which are counted from 0."""
        level = time * self.num_levels - 1
        if not self.head.generative:
            x_t, level = repeat(self.queries, "k a -> b k a", b=len(x_t)), torch.zeros_like(level)
        given = condition.vector if isinstance(self.denoiser, ConditionedUNet) else condition.tokens
        return self.denoiser(x_t.to(given), level, given)

    def _check_pictures(self) -> None:
        """Raises ValueError where a camera's feature map is a single cell, in which nothing has a place."""
        for index, camera in enumerate(self.spec.cameras):
            encoder: Any = self.encoders[index if len(self.encoders) > 1 else 0]
            height, width = self.resize or (camera.height, camera.width)
            size = encoder.crop_size(height, width)
            if max(size) <= ResNet18.stride:
                raise ValueError(
                    f"camera {camera.name!r}: after framework.crop a side of a picture must have more than "
                    f"{ResNet18.stride} pixels, found {size}; set framework.resize=[96,96]"
                )

    def _see(self, observation: Observation, index: int, name: str) -> Float[Tensor, "b t f"]:
        """One camera's features; zeros where it is absent."""
        pixels = observation.images[name]
        b, present = len(pixels), observation.image_mask[name]
        pixels = rearrange(pixels, "b t c h w -> (b t) c h w").float()
        if self.resize is not None:
            pixels = functional.interpolate(
                pixels, tuple(self.resize), mode="bilinear", align_corners=False, antialias=True
            )
        encoder = self.encoders[index if len(self.encoders) > 1 else 0]
        features = rearrange(encoder(pixels.to(self.compute_dtype), index), "(b t) f -> b t f", b=b)
        return features.masked_fill(~present[:, None, None], 0.0)
