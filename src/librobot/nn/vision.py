"""Small vision towers, trained from scratch: pictures in, a few visual tokens out.

A tower is built as `tower(width=...)` and called as `tower(pixels, sentence)` with pixels (m, 3, h, w) in
[-1, 1] and, where `text_width` is not 0, one vector per picture that stands for the instruction. It returns
(m, v, d). Any picture size works.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from librobot.nn.positions import sine_map


class Tower(nn.Module):
    """`text_width` is the size of the sentence vector that the tower wants, 0 for none."""

    text_width: int = 0

    def forward(
        self, pixels: Float[Tensor, "m 3 h w"], sentence: Float[Tensor, "m e"] | None
    ) -> Float[Tensor, "m v d"]:
        raise NotImplementedError


class PatchTower(Tower):
    """Patches as tokens (Dosovitskiy et al. 2021): a strided convolution, then a few transformer blocks.

    Needs far more data than `KeypointTower` before it locates anything precisely.
    """

    def __init__(
        self,
        width: int,
        *,
        patch_size: int = 8,
        tower_width: int = 96,
        num_blocks: int = 2,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.embed = nn.Conv2d(3, tower_width, patch_size, stride=patch_size)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                tower_width,
                num_heads,
                2 * tower_width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(tower_width)
        self.project = nn.Linear(tower_width, width)

    def forward(
        self, pixels: Float[Tensor, "m 3 h w"], sentence: Float[Tensor, "m e"] | None
    ) -> Float[Tensor, "m v d"]:
        short_by = [-size % self.patch_size for size in pixels.shape[-2:]]
        pixels = functional.pad(pixels, (0, short_by[1], 0, short_by[0]))
        patches = rearrange(self.embed(pixels), "m d h w -> m h w d")
        _, height, width, channels = patches.shape
        patches = patches + sine_map(height, width, channels).to(patches)
        tokens = rearrange(patches, "m h w d -> m (h w) d")
        for block in self.blocks:
            tokens = block(tokens)
        return self.project(self.norm(tokens))


class FiLM(nn.Module):
    """Channel norm, then a scale and shift that follow from the instruction: (1 + scale) * norm(x) + shift.

    As in RT-1 (Brohan et al. 2022) and OpenVLA-OFT (Kim et al. 2025). Those start it as the identity to
    protect pretrained features; here there are none, so it starts at random.
    """

    def __init__(self, channels: int, text_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.film = nn.Linear(text_width, 2 * channels)

    def forward(
        self, x: Float[Tensor, "m c h w"], sentence: Float[Tensor, "m e"]
    ) -> Float[Tensor, "m c h w"]:
        scale, shift = self.film(sentence)[:, None, None].chunk(2, dim=-1)
        # In memory the channels come last (channels_last), so these permutations move nothing.
        x = torch.addcmul(shift, self.norm(x.permute(0, 2, 3, 1)), 1 + scale)
        return x.permute(0, 3, 1, 2)


class KeypointTower(Tower):
    """Where things are, as points: convolutions, FiLM, and a spatial soft-argmax.

    Each keypoint channel becomes a distribution over the feature map (a quarter of the picture's size) and
    yields its expected position in [-1, 1] (Levine et al. 2016; Finn et al. 2016) and the feature found
    there. `keypoints_per_token` of them share a token.
    """

    def __init__(
        self,
        width: int,
        *,
        channels: int = 32,
        num_blocks: int = 1,
        num_keypoints: int = 32,
        keypoints_per_token: int = 4,
        text_width: int = 64,
    ) -> None:
        super().__init__()
        if num_keypoints % keypoints_per_token:
            raise ValueError(
                f"num_keypoints must be a multiple of keypoints_per_token, "
                f"found {num_keypoints} and {keypoints_per_token}"
            )
        if channels % 16:
            raise ValueError(f"channels must be a multiple of 16, found {channels}")
        self.text_width = text_width
        self.keypoints_per_token = keypoints_per_token
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels // 2, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1),
        )
        self.stem_film = FiLM(channels, text_width)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(num_blocks)
        )
        self.films = nn.ModuleList(FiLM(channels, text_width) for _ in range(num_blocks))
        self.keypoints = nn.Conv2d(channels, num_keypoints, 1)
        self.log_temperature = nn.Parameter(torch.zeros(num_keypoints))
        self.project = nn.Linear(keypoints_per_token * (2 + channels), width)

    def heatmaps(
        self, pixels: Float[Tensor, "m 3 h w"], sentence: Float[Tensor, "m e"]
    ) -> tuple[Float[Tensor, "m p y x"], Float[Tensor, "m c y x"]]:
        """Each keypoint's distribution over the feature map (sums to 1), and the feature map."""
        features = self.stem(pixels.contiguous(memory_format=torch.channels_last))
        features = functional.relu(self.stem_film(features, sentence))
        for convolution, film in zip(self.convolutions, self.films, strict=True):
            features = features + functional.relu(film(convolution(features), sentence))
        height, width = features.shape[-2:]
        logits = self.keypoints(features).float() * self.log_temperature.float().exp()[:, None, None]
        weights = rearrange(logits, "m p y x -> m p (y x)").softmax(dim=-1)
        return rearrange(weights, "m p (y x) -> m p y x", y=height, x=width), features

    def forward(
        self, pixels: Float[Tensor, "m 3 h w"], sentence: Float[Tensor, "m e"] | None
    ) -> Float[Tensor, "m v d"]:
        if sentence is None:
            raise ValueError("the keypoint tower needs a sentence vector for every picture")
        heatmaps, features = self.heatmaps(pixels, sentence)
        height, width = features.shape[-2:]
        rows = torch.linspace(-1, 1, height, device=pixels.device, dtype=torch.float32)
        columns = torch.linspace(-1, 1, width, device=pixels.device, dtype=torch.float32)
        y = heatmaps.sum(dim=3) @ rows
        x = heatmaps.sum(dim=2) @ columns
        found = torch.einsum("mpyx,mcyx->mpc", heatmaps.to(features.dtype), features)
        points = torch.cat((torch.stack((x, y), dim=-1).to(found.dtype), found), dim=-1)
        return self.project(rearrange(points, "m (v g) f -> m v (g f)", g=self.keypoints_per_token))
