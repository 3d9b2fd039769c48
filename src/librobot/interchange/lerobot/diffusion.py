"""lerobot's Diffusion Policy (`"type": "diffusion"`)."""

from __future__ import annotations

from librobot.interchange.weights import Rule, WeightMap
from librobot.nn.keypoint_encoder import position_grid
from librobot.nn.resnet import ResNet18

RESNET = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
"""torchvision's parts in the order of lerobot's sequence of them."""

BLOCK = {  # of the U-Net
    "conv1.block.*": "first.*",
    "conv2.block.*": "second.*",
    "cond_encoder.*": "film.*",
    "residual_conv.*": "shortcut.*",
}


def weight_map(*, num_encoders: int | None, picture: tuple[int, int]) -> WeightMap:
    """The table of tensor names.

    `num_encoders` is None where all cameras share one. `picture` is the size in pixels that the encoder sees,
    after the crop: lerobot stores the grid of the spatial softmax, which follows from it.
    """
    places = [""] if num_encoders is None else [f"{i}." for i in range(num_encoders)]
    grid = position_grid(*(-(-side // ResNet18.stride) for side in picture))
    grids = {f"diffusion.rgb_encoder.{place}pool.pos_grid": grid for place in places}
    theirs, ours = "diffusion.rgb_encoder.", "encoders.0."
    if num_encoders is not None:
        theirs, ours = "diffusion.rgb_encoder.*.", "encoders.*."
    rules = [
        *(Rule(f"{theirs}backbone.{i}.*", f"{ours}resnet.network.{name}.*") for i, name in enumerate(RESNET)),
        Rule(f"{theirs}pool.nets.*", f"{ours}pool.proj.*"),
        Rule(f"{theirs}out.*", f"{ours}out_proj.*"),
        Rule("diffusion.unet.diffusion_step_encoder.1.*", "denoiser.level_mlp.0.*"),
        Rule("diffusion.unet.diffusion_step_encoder.3.*", "denoiser.level_mlp.2.*"),
        *(Rule(f"diffusion.unet.mid_modules.*.{a}", f"denoiser.unet.middle.*.{b}") for a, b in BLOCK.items()),
    ]
    for part in ("down", "up"):
        start_theirs, start_ours = f"diffusion.unet.{part}_modules.*.", f"denoiser.unet.{part}.*."
        for index, place in enumerate(("first", "second")):
            rules += [
                Rule(f"{start_theirs}{index}.{a}", f"{start_ours}{place}.{b}") for a, b in BLOCK.items()
            ]
        rules.append(Rule(f"{start_theirs}2.*", f"{start_ours}resample.*"))
    rules += [
        Rule("diffusion.unet.final_conv.0.block.*", "denoiser.unet.last.*"),
        Rule("diffusion.unet.final_conv.1.*", "denoiser.unet.output_proj.*"),
    ]
    return WeightMap(rules=rules, unused=list(grids), made=lambda _: grids)
