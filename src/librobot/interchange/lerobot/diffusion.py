"""lerobot's Diffusion Policy (`"type": "diffusion"`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from librobot.errors import LibrobotError
from librobot.heads.ddpm import DDPM
from librobot.interchange.base import Imported, ImportOptions
from librobot.interchange.lerobot.folder import (
    Exported,
    LeRobotFolder,
    mapping_of,
    picture_statistics_of,
    statistics_of,
)
from librobot.interchange.weights import Rule, WeightMap
from librobot.nn.keypoint_encoder import position_grid
from librobot.nn.resnet import ResNet18
from librobot.policy import Policy

RESNET = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
"""torchvision's parts in the order of lerobot's sequence of them."""

BLOCK = {  # of the U-Net
    "conv1.block.*": "first.*",
    "conv2.block.*": "second.*",
    "cond_encoder.*": "film.*",
    "residual_conv.*": "shortcut.*",
}

OPTIONS = {  # config.json -> our YAML
    "horizon": "horizon",
    "n_obs_steps": "obs_steps",
    "spatial_softmax_num_keypoints": "num_keypoints",
    "use_separate_rgb_encoder_per_camera": "encoder_per_camera",
    "down_dims": "level_channels",
    "kernel_size": "kernel_size",
    "n_groups": "num_groups",
    "diffusion_step_embed_dim": "level_width",
    "use_film_scale_modulation": "film_scale",
    "do_mask_loss_for_padding": "mask_padding",
    "resize_shape": "resize",
}
SCHEDULES = {"squaredcos_cap_v2": "squared_cosine", "linear": "linear", "sigmoid": "sigmoid"}
SAMPLERS = {"DDPM": "ancestral", "DDIM": "ddim"}


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


def read(folder: LeRobotFolder, options: ImportOptions) -> Imported:
    folder.expect(vision_backbone="resnet18")
    config, pictures, place = folder.config, folder.picture_statistics(), folder.path / "config.json"
    if not folder.camera_keys or "observation.environment_state" in config["input_features"]:
        raise LibrobotError(
            f"{place}: input_features must hold cameras and no observation.environment_state, found "
            f"{sorted(config['input_features'])}; librobot's Diffusion Policy does not read it"
        )
    spec = folder.spec(options)
    num_encoders = len(spec.cameras) if config["use_separate_rgb_encoder_per_camera"] else None
    crop = config.get("crop_shape")
    seen = crop or config.get("resize_shape") or (spec.cameras[0].height, spec.cameras[0].width)
    table = weight_map(num_encoders=num_encoders, picture=(seen[0], seen[1]))
    return Imported(
        choices={"framework": "diffusion_policy", "head": "ddpm", "vlm": "tiny"},
        values={f"framework.{ours}": config.get(theirs) for theirs, ours in OPTIONS.items()}
        | {
            "framework.backbone": "resnet18",
            "framework.crop": 1.0 if crop is None else list(crop),
            "framework.resnet_norm": "group" if config["use_group_norm"] else "batch",
            "framework.normalization": folder.normalization(),
            "framework.picture_mean": pictures["mean"],
            "framework.picture_std": pictures["std"],
        }
        | {f"head.{name}": value for name, value in scheduler(config, str(place)).items()},
        spec=spec,
        weights=table.to_ours(folder.weights(), str(folder.path / "model.safetensors")),
        statistics=folder.our_statistics(),
    )


def scheduler(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """diffusers' scheduler as options of `head=ddpm`. Its linear betas are those of its own number of levels,
    ours those of 1000."""
    for key, known in (("beta_schedule", SCHEDULES), ("noise_scheduler_type", SAMPLERS)):
        if config[key] not in known:
            raise LibrobotError(f"{place}: {key} must be one of {', '.join(known)}, found {config[key]!r}")
    levels = config["num_train_timesteps"]
    return {
        "num_train_steps": levels,
        "schedule": SCHEDULES[config["beta_schedule"]],
        "beta_start": config["beta_start"] * levels / 1000,
        "beta_end": config["beta_end"] * levels / 1000,
        "prediction": config["prediction_type"],
        "sampler": SAMPLERS[config["noise_scheduler_type"]],
        "num_steps": config.get("num_inference_steps") or levels,
        "spacing": "leading",
        "clip": config["clip_sample_range"] if config["clip_sample"] else None,
    }


def write(policy: Policy) -> Exported:
    framework: Any = policy.framework
    check_exportable(policy)
    options, head = policy.config["framework"], policy.config["head"]
    encoder = framework.encoders[0]
    camera = policy.spec.cameras[0]
    seen = encoder.crop_size(*(framework.resize or (camera.height, camera.width)))
    shared = len(framework.encoders) == 1 and not options["encoder_per_camera"]
    table = weight_map(num_encoders=None if shared else len(framework.encoders), picture=seen)
    levels = framework.num_levels
    return Exported(
        config={theirs: options[ours] for theirs, ours in OPTIONS.items()}
        | {
            "type": "diffusion",
            "n_action_steps": framework.num_future_actions,
            "drop_n_last_frames": 0,
            "vision_backbone": "resnet18",
            "pretrained_backbone_weights": None,
            "use_group_norm": options["resnet_norm"] == "group",
            "crop_shape": list(seen),
            # With a size to resize to, lerobot computes the crop from a share of it.
            "crop_ratio": 1.0 if framework.resize is None else share(framework.resize, seen),
            "num_train_timesteps": levels,
            "beta_schedule": {ours: theirs for theirs, ours in SCHEDULES.items()}[head["schedule"]],
            "beta_start": head["beta_start"] * 1000 / levels,
            "beta_end": head["beta_end"] * 1000 / levels,
            "prediction_type": head["prediction"],
            "noise_scheduler_type": {ours: theirs for theirs, ours in SAMPLERS.items()}[head["sampler"]],
            "num_inference_steps": head["num_steps"],
            "clip_sample": head["clip"] is not None,
            "clip_sample_range": head["clip"] or 1.0,
            "normalization_mapping": mapping_of(framework.normalizer.modes) | {"VISUAL": "MEAN_STD"},
            "device": "cpu",
        },
        weights=table.to_theirs(framework.state_dict(), "diffusion"),
        statistics=statistics_of(policy)
        | picture_statistics_of(encoder.resnet.mean, encoder.resnet.std, policy.spec.camera_names),
    )


def check_exportable(policy: Policy) -> None:
    """Raises LibrobotError where lerobot's policy could not be this one."""
    framework: Any = policy.framework
    options, head = policy.config["framework"], policy.config["head"]
    cameras = {(camera.height, camera.width) for camera in policy.spec.cameras}
    multiple = 2 ** len(options["level_channels"])
    leading = head.get("spacing") == "leading" or head.get("num_steps") == head.get("num_train_steps")
    exact = {
        "framework.backbone": (framework.vlm is None, "resnet18", options["backbone"]),
        "framework.denoiser": (options["denoiser"] == "unet", "unet", options["denoiser"]),
        "framework.resnet_norm": (
            options["resnet_norm"] != "frozen_batch",
            "group or batch",
            options["resnet_norm"],
        ),
        "framework.horizon": (
            framework.horizon % multiple == 0,
            f"a multiple of {multiple}",
            framework.horizon,
        ),
        "head": (type(framework.head) is DDPM, "ddpm", type(framework.head).__name__),
        "head.prediction": (head.get("prediction") != "v", "epsilon or sample", "v"),
        "head.sampler": (head.get("sampler") in SAMPLERS.values(), "ancestral or ddim", head.get("sampler")),
        "head.spacing": (leading, "leading, or all levels visited", head.get("spacing")),
        "the cameras' size": (len(cameras) == 1, "the same for all", sorted(cameras)),
        "embodiments": (len(framework.embodiments) == 1, 1, len(framework.embodiments)),
    }
    for place, (fits, expected, found) in exact.items():
        if not fits:
            raise LibrobotError(
                f"lerobot's diffusion cannot hold this policy: {place} must be {expected}, found {found}"
            )


def share(size: tuple[int, int], crop: tuple[int, int]) -> float:
    """The share of `size` that gives exactly `crop` when it is rounded down."""
    lowest = max(part / side for part, side in zip(crop, size, strict=True))
    if any(int(side * lowest) != part for part, side in zip(crop, size, strict=True)):
        raise LibrobotError(
            f"lerobot's diffusion cannot hold this policy: framework.crop must be one share of both sides of "
            f"framework.resize={list(size)}, found {list(crop)}"
        )
    return lowest
