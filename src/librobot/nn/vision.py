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
        self.norm = nn.LayerNorm(channels, elementwise_affine=False)
        self.film = nn.Linear(text_width, 2 * channels)

    def forward(
        self, x: Float[Tensor, "m h w c"], sentence: Float[Tensor, "m e"]
    ) -> Float[Tensor, "m h w c"]:
        scale, shift = self.film(sentence)[:, None, None].chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm(x), 1 + scale)


class KeypointBlock(nn.Module):
    """Residual depthwise and pointwise convolution (as in MobileNet), with FiLM."""

    def __init__(self, channels: int, text_width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.pointwise = nn.Linear(channels, channels)
        self.film = FiLM(channels, text_width)

    def forward(
        self, x: Float[Tensor, "m h w c"], sentence: Float[Tensor, "m e"]
    ) -> Float[Tensor, "m h w c"]:
        y = self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + functional.relu(self.film(self.pointwise(y), sentence))


class KeypointTower(Tower):
    """Where things are, as points: convolutions with FiLM, then a spatial soft-argmax.

    Each keypoint channel becomes a distribution over the feature map (a quarter of the picture's size) and
    yields its expected position in [-1, 1] (Levine et al. 2016; Finn et al. 2016). The tokens of a picture:
    one for every `keypoints_per_token` positions, and one that holds each feature's maximum over the picture,
    which says what is there.
    """

    def __init__(
        self,
        width: int,
        *,
        channels: int = 48,
        num_blocks: int = 2,
        num_keypoints: int = 32,
        keypoints_per_token: int = 8,
        text_width: int = 96,
    ) -> None:
        super().__init__()
        if num_keypoints % keypoints_per_token:
            raise ValueError(
                f"num_keypoints must be a multiple of keypoints_per_token, "
                f"found {num_keypoints} and {keypoints_per_token}"
            )
        self.text_width = text_width
        self.keypoints_per_token = keypoints_per_token
        self.stem = nn.Conv2d(3, channels, 8, stride=4, padding=2)
        self.stem_film = FiLM(channels, text_width)
        self.blocks = nn.ModuleList(KeypointBlock(channels, text_width) for _ in range(num_blocks))
        self.keypoints = nn.Linear(channels, num_keypoints)
        self.log_temperature = nn.Parameter(torch.ones(()))
        num_tokens = num_keypoints // keypoints_per_token
        self.project_points = nn.ModuleList(
            nn.Linear(2 * keypoints_per_token, width) for _ in range(num_tokens)
        )
        self.project_features = nn.Linear(channels, width)

    def heatmaps(
        self, pixels: Float[Tensor, "m 3 h w"], sentence: Float[Tensor, "m e"]
    ) -> tuple[Float[Tensor, "m y x p"], Float[Tensor, "m y x c"]]:
        """Each keypoint's distribution over the feature map (sums to 1), and the feature map."""
        # Channels last throughout: only the convolutions see another order, as a view.
        features = self.stem(pixels.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        features = functional.relu(self.stem_film(features, sentence))
        for block in self.blocks:
            features = block(features, sentence)
        logits = self.keypoints(features).float() * self.log_temperature.float().exp()
        return logits.flatten(1, 2).softmax(dim=1).reshape(logits.shape), features

    def forward(
        self, pixels: Float[Tensor, "m 3 h w"], sentence: Float[Tensor, "m e"] | None
    ) -> Float[Tensor, "m v d"]:
        if sentence is None:
            raise ValueError("the keypoint tower needs a sentence vector for every picture")
        heatmaps, features = self.heatmaps(pixels, sentence)
        rows = torch.linspace(-1, 1, heatmaps.shape[1]).to(heatmaps)
        columns = torch.linspace(-1, 1, heatmaps.shape[2]).to(heatmaps)
        places = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
        points = torch.einsum("myxp,yxc->mpc", heatmaps, places).to(features.dtype)
        groups = rearrange(points, "m (v g) xy -> v m (g xy)", g=self.keypoints_per_token)
        tokens = [project(group) for project, group in zip(self.project_points, groups, strict=True)]
        tokens.append(self.project_features(features.amax(dim=(1, 2))))
        return torch.stack(tokens, dim=1)
