"""ResNet-18 without its classifier: the pictures' statistics, a choice of norms, the last feature map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.ops.misc import FrozenBatchNorm2d

from librobot.errors import LibrobotError
from librobot.nn.pretrained import wants_pretrained

ResNetNorm = Literal["frozen_batch", "batch", "group"]
Statistic = Sequence[float] | Sequence[Sequence[float]]
"""Three numbers (red, green, blue, of values in [0, 1]), or three for each camera."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def group_norm(channels: int) -> nn.GroupNorm:
    """Groups of 16 channels, in the place of batch norm (Chi et al. 2023, section III)."""
    return nn.GroupNorm(channels // 16, channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "frozen_batch": FrozenBatchNorm2d,
    "batch": nn.BatchNorm2d,
    "group": group_norm,
}


class ResNet18(nn.Module):
    """Pictures (uint8 values as floats) to a 512-channel map at 1/32 of their size (He et al. 2016).

    `norm` is ACT's frozen batch norm, trained batch norm, or Diffusion Policy's group norm. `pretrained` True
    loads torchvision's ImageNet weights (downloaded once); text is the path of a state dict. `mean` and `std`
    are those of pixels in [0, 1], one row for all cameras or one for each.
    """

    channels = 512
    stride = 32
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        pretrained: bool | str = False,
        *,
        norm: ResNetNorm = "frozen_batch",
        mean: Statistic = IMAGENET_MEAN,
        std: Statistic = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(get_args(ResNetNorm))}, found {norm!r}")
        if pretrained and norm == "group":
            raise ValueError(
                "pretrained weights were made with batch norms, found norm='group'; take norm=batch, or "
                "pretrained=false"
            )
        network = resnet18(norm_layer=NORMS[norm])
        if wants_pretrained(pretrained):
            network.load_state_dict(_weights(pretrained), strict=False)
        del network.fc, network.avgpool
        self.network = network
        for name, value in (("mean", mean), ("std", std)):
            rows = torch.tensor(value, dtype=torch.float32)
            if rows.shape[-1:] != (3,) or rows.ndim > 2:
                raise ValueError(f"{name} must hold three numbers, or three for each camera, found {value}")
            self.register_buffer(name, rows.reshape(-1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Float[Tensor, "m 3 h w"], camera: int = 0) -> Float[Tensor, "m d y x"]:
        """`camera` numbers the camera, for statistics that differ between them."""
        net = self.network
        mean, std = (x[camera if len(x) > 1 else 0] for x in (self.mean, self.std))
        x = (pixels / 255.0 - mean) / std
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        return net.layer4(net.layer3(net.layer2(net.layer1(x))))


def _weights(pretrained: bool | str) -> dict[str, Tensor]:
    try:
        if isinstance(pretrained, str):
            return torch.load(Path(pretrained).expanduser(), map_location="cpu", weights_only=True)
        return dict(ResNet18_Weights.IMAGENET1K_V1.get_state_dict(progress=True))
    except (OSError, RuntimeError) as error:
        raise LibrobotError(
            f"could not load ResNet-18 weights ({error}); where there is no network, download "
            f"{ResNet18_Weights.IMAGENET1K_V1.url} and set framework.pretrained to the file's path"
        ) from error
