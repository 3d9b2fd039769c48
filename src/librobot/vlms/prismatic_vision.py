"""The two vision transformers of Prismatic (Karamcheti et al. 2024, arXiv 2402.07865): DINOv2 and SigLIP.

Each gives its second-to-last layer's patches, without a final norm; both are put side by side. Modules are
named as in timm, whose weights the published models hold; the last layer and what follows it never count, and
are not built. With FiLM (OpenVLA-OFT+) every layer also scales and shifts what stands between its attention
and its MLP by the mean of the prompt's embeddings.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        q, k, v = rearrange(self.qkv(x), "b l (three h e) -> three b h l e", three=3, h=self.num_heads)
        return self.proj(rearrange(functional.scaled_dot_product_attention(q, k, v), "b h l e -> b l (h e)"))


class MLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    """Pre-norm; `film_width` is that of the language's embeddings, None without FiLM."""

    def __init__(
        self, width: int, num_heads: int, mlp_width: int, layer_scale: bool, film_width: int | None
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = SelfAttention(width, num_heads)
        self.mlp = MLP(width, mlp_width)
        self.ls1, self.ls2 = (LayerScale(width) if layer_scale else nn.Identity() for _ in range(2))
        self.scale = self.shift = None
        if film_width is not None:
            self.scale, self.shift = nn.Linear(film_width, width), nn.Linear(film_width, width)

    def forward(
        self, x: Float[Tensor, "b l d"], language: Float[Tensor, "b e"] | None = None
    ) -> Float[Tensor, "b l d"]:
        x = x + self.ls1(self.attn(self.norm1(x)))
        if self.scale is not None and self.shift is not None:
            assert language is not None
            x = x * (1 + self.scale(language)[:, None]) + self.shift(language)[:, None]
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbedding(nn.Module):
    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l d"]:
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


class VisionTransformer(nn.Module):
    """`num_layers` counts the published model's, of which all but the last are built. `num_registers` tokens
    and a class token stand before DINOv2's patches; SigLIP has neither."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        mlp_width: int,
        image_size: int,
        patch_size: int = 14,
        num_registers: int | None = None,
        layer_scale: bool = False,
        film_width: int | None = None,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(hidden_size, patch_size)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (image_size // patch_size) ** 2, hidden_size))
        self.cls_token = self.reg_token = None
        if num_registers is not None:
            self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, hidden_size))
            self.reg_token = nn.Parameter(0.02 * torch.randn(1, num_registers, hidden_size))
        self.blocks = nn.ModuleList(
            VisionLayer(hidden_size, num_heads, mlp_width, layer_scale, film_width)
            for _ in range(num_layers - 1)
        )

    def forward(
        self, pixels: Float[Tensor, "b c h w"], language: Float[Tensor, "b e"] | None = None
    ) -> Float[Tensor, "b l d"]:
        x = self.patch_embed(pixels) + self.pos_embed
        before = [
            token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None
        ]
        num_before = sum(token.shape[1] for token in before)
        x = torch.cat((*before, x), dim=1)
        for block in self.blocks:
            x = block(x, language)
        return x[:, num_before:]


class FusedVision(nn.Module):
    """DINOv2's patches, then SigLIP's, along the width. Each sees pictures normalised in its own way."""

    def __init__(self, config: Any, film_width: int | None) -> None:
        super().__init__()
        self.dino = VisionTransformer(**config.dino, image_size=config.image_size, film_width=film_width)
        self.siglip = VisionTransformer(**config.siglip, image_size=config.image_size, film_width=film_width)
        self.language: Tensor | None = None  # of the pictures that come next, for FiLM

    @property
    def blocks(self) -> nn.ModuleList:
        return nn.ModuleList([*self.dino.blocks, *self.siglip.blocks])

    def forward(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l d"]:
        language, self.language = self.language, None
        dino = self.dino(normalized(pixels, *IMAGENET), language)
        return torch.cat((dino, self.siglip(normalized(pixels, *HALF), language)), dim=2)


class Projector(nn.Module):
    """Three layers with GELU between them; the first is four times as wide as the patches."""

    def __init__(self, vision_width: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_width, 4 * vision_width)
        self.fc2 = nn.Linear(4 * vision_width, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(functional.gelu(self.fc2(functional.gelu(self.fc1(x)))))


def normalized(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Pixels in [0, 1] with this mean and deviation for each channel."""
    offset, scale = (pixels.new_tensor(x)[:, None, None] for x in (mean, std))
    return (pixels - offset) / scale
