"""ResNet-18 as ACT uses it: ImageNet's input statistics, frozen batch norms, the last feature map."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.ops.misc import FrozenBatchNorm2d

from librobot.errors import LibrobotError
from librobot.nn.pretrained import wants_pretrained


class ResNet18(nn.Module):
    """Pictures (uint8 values as floats) to a 512-channel map at 1/32 of their size (He et al. 2016).

    `pretrained` True loads torchvision's ImageNet weights (downloaded once); text is the path of a state
    dict.
    """

    channels = 512
    mean: Tensor
    std: Tensor

    def __init__(self, pretrained: bool | str = False) -> None:
        super().__init__()
        network = resnet18(norm_layer=FrozenBatchNorm2d)
        if wants_pretrained(pretrained):
            network.load_state_dict(_weights(pretrained), strict=False)
        del network.fc, network.avgpool
        self.network = network
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)

    def forward(self, pixels: Float[Tensor, "m 3 h w"]) -> Float[Tensor, "m d y x"]:
        net = self.network
        x = (pixels / 255.0 - self.mean) / self.std
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
