"""System 1 of Helix (Figure 2025): an encoder-decoder over what it sees and a latent that it is told.

encoder   [each camera's tokens of several scales | state | latent], attending to each other
decoder   one query per action of the chunk, attending to each other and to the encoder's output
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from librobot.nn.detr import Decoder, Encoder, LayerOptions
from librobot.nn.multiscale import MultiScaleEyes
from librobot.nn.positions import time_embedding
from librobot.types import Observation


@dataclass
class Memory:
    """The encoder's output: what the decoder attends to."""

    values: Float[Tensor, "b l d"]
    mask: Bool[Tensor, "b l"]


class FastEncoder(nn.Module):
    """One observation step and the latent to the memory. All cameras share the eyes."""

    def __init__(
        self,
        eyes: MultiScaleEyes,
        layer: LayerOptions,
        *,
        num_layers: int,
        num_cameras: int,
        state_dim: int,
        latent_dim: int,
        image_size: int,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.eyes = eyes
        self.camera_embedding = nn.Embedding(num_cameras, layer.width)
        self.state_proj = nn.Linear(state_dim, layer.width) if state_dim else None
        self.latent_proj = nn.Linear(latent_dim, layer.width)
        self.encoder = Encoder(num_layers, layer)
        nn.init.normal_(self.camera_embedding.weight, std=0.5)

    def forward(
        self, observation: Observation, state: Float[Tensor, "b s"], latent: Float[Tensor, "b z"]
    ) -> Memory:
        """`observation` with one step, its cameras in the robot's order; `state` normalised."""
        dtype = self.latent_proj.weight.dtype
        told = [self.latent_proj(latent.to(dtype))]
        if self.state_proj is not None:
            told.insert(0, self.state_proj(state.to(dtype)))
        pixels = torch.stack([self._resized(image[:, 0]) for image in observation.images.values()], dim=1)
        b, n = pixels.shape[:2]
        seen = self.eyes(rearrange(pixels, "b n c h w -> (b n) c h w").to(dtype))
        seen = rearrange(seen, "(b n) l d -> b n l d", b=b) + self.camera_embedding.weight[:n, None]
        present = torch.stack([observation.image_mask[name] for name in observation.images], dim=1)
        real = repeat(present, "b n -> b (n l)", l=seen.shape[2])
        values = torch.cat((rearrange(seen, "b n l d -> b (n l) d"), torch.stack(told, dim=1)), dim=1)
        mask = torch.cat((real, real.new_ones(b, len(told))), dim=1)
        return Memory(self.encoder(values, torch.zeros_like(values[:1]), mask), mask)

    def _resized(self, picture: Tensor) -> Float[Tensor, "b c h w"]:
        """uint8 of any size to [-1, 1] at the model's size (floats in [0, 1] too)."""
        pixels = picture.float() * (2.0 if picture.is_floating_point() else 1 / 127.5) - 1.0
        size = (self.image_size, self.image_size)
        if pixels.shape[-2:] != size:
            pixels = functional.interpolate(pixels, size, mode="bilinear", antialias=True)
        return pixels.to(next(self.parameters()).dtype)


class FastDecoder(nn.Module):
    """The memory to a chunk; the noisy chunk and its time are added to the queries' input where a head has
    them."""

    def __init__(
        self,
        layer: LayerOptions,
        *,
        num_layers: int,
        horizon: int,
        action_dim: int,
        output_width: int,
        takes_noise: bool,
    ) -> None:
        super().__init__()
        self.decoder = Decoder(num_layers, layer)
        self.queries = nn.Embedding(horizon, layer.width)
        self.takes_noise = takes_noise
        if takes_noise:
            self.noisy_action_proj = nn.Linear(action_dim, layer.width)
            self.time_mlp = nn.Sequential(
                nn.Linear(layer.width, layer.width), nn.SiLU(), nn.Linear(layer.width, layer.width)
            )
        self.action_out_proj = nn.Linear(layer.width, output_width)

    def forward(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], memory: Memory
    ) -> Float[Tensor, "b k o"]:
        values = memory.values
        x = repeat(self.queries.weight, "k d -> b k d", b=len(values))
        if self.takes_noise:
            told = self.time_mlp(time_embedding(time, values.shape[-1]).to(values))
            x = x + self.noisy_action_proj(x_t.to(values)) + told[:, None]
        x = self.decoder(x, self.queries.weight, values, torch.zeros_like(values[:1]), memory.mask)
        return self.action_out_proj(x)
