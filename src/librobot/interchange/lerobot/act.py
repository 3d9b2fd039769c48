"""lerobot's ACT (`"type": "act"`)."""

from __future__ import annotations

from typing import Any

from librobot.errors import LibrobotError
from librobot.interchange.base import Imported, ImportOptions
from librobot.interchange.lerobot.folder import (
    Exported,
    LeRobotFolder,
    mapping_of,
    picture_statistics_of,
    statistics_of,
)
from librobot.interchange.weights import Rule, WeightMap
from librobot.nn.positions import sine_table
from librobot.policy import Policy

PARTS = {
    "encoder_latent_input_proj": "latent_proj",
    "encoder_robot_state_input_proj": "state_proj",
    "encoder_1d_feature_pos_embed": "plain_positions",
    "decoder_pos_embed": "queries",
    "action_head": "action_out_proj",
    "vae_encoder_cls_embed": "vae_cls",
    "vae_encoder_robot_state_input_proj": "vae_state_proj",
    "vae_encoder_action_input_proj": "vae_action_proj",
    "vae_encoder_latent_output_proj": "vae_out_proj",
    "backbone": "resnet.network",
    "encoder.norm": "encoder.norm",
    "vae_encoder.norm": "vae_encoder.norm",
    "decoder.norm": "decoder.norm",
}
ENCODER_LAYER = {
    "self_attn": "attention",
    "linear1": "feed_forward.0",
    "linear2": "feed_forward.3",
    "norm1": "around_attention.norm",
    "norm2": "around_feed_forward.norm",
}
DECODER_LAYER = {
    "self_attn": "self_attention",
    "multihead_attn": "cross_attention",
    "linear1": "feed_forward.0",
    "linear2": "feed_forward.3",
    "norm1": "around_self_attention.norm",
    "norm2": "around_cross_attention.norm",
    "norm3": "around_feed_forward.norm",
}
OPTIONS = {  # config.json -> our YAML
    "chunk_size": "horizon",
    "dim_model": "width",
    "n_heads": "num_heads",
    "dim_feedforward": "feedforward_width",
    "feedforward_activation": "activation",
    "n_encoder_layers": "num_encoder_layers",
    "n_decoder_layers": "num_decoder_layers",
    "n_vae_encoder_layers": "num_vae_layers",
    "use_vae": "use_vae",
    "latent_dim": "latent_dim",
    "pre_norm": "pre_norm",
    "dropout": "dropout",
    "kl_weight": "kl_weight",
}
VAE_POSITIONS = "model.vae_encoder_pos_enc"


def weight_map(*, vae_length: int, width: int) -> WeightMap:
    """The table of tensor names. `vae_length` is the number of the style encoder's tokens, whose fixed
    positions lerobot stores (0: there is no style encoder)."""
    rules = [
        Rule(
            "model.encoder_img_feat_input_proj.weight",  # a convolution of one pixel
            "observation_proj.weight",
            to_ours=lambda weight: weight[:, :, 0, 0],
            to_theirs=lambda weight: weight[:, :, None, None],
        ),
        Rule("model.encoder_img_feat_input_proj.bias", "observation_proj.bias"),
        *(Rule(f"model.{theirs}.*", f"{ours}.*") for theirs, ours in PARTS.items()),
    ]
    for stack, layer in (
        ("encoder", ENCODER_LAYER),
        ("vae_encoder", ENCODER_LAYER),
        ("decoder", DECODER_LAYER),
    ):
        rules += [
            Rule(f"model.{stack}.layers.*.{theirs}.*", f"{stack}.layers.*.{ours}.*")
            for theirs, ours in layer.items()
        ]
    stored = {VAE_POSITIONS: sine_table(vae_length, width)[None]} if vae_length else {}
    return WeightMap(rules, unused=[VAE_POSITIONS], made=lambda _: stored)


def read(folder: LeRobotFolder, options: ImportOptions) -> Imported:
    folder.expect(n_obs_steps=1, vision_backbone="resnet18", replace_final_stride_with_dilation=False)
    if not folder.camera_keys:
        raise LibrobotError(
            f"{folder.path / 'config.json'}: input_features must hold a camera, found none; librobot's ACT "
            f"does not read observation.environment_state"
        )
    config, pictures = folder.config, folder.picture_statistics()
    spec = folder.spec(options)
    length = 1 + (spec.state_dim > 0) + config["chunk_size"] if config["use_vae"] else 0
    table = weight_map(vae_length=length, width=config["dim_model"])
    return Imported(
        choices={"framework": "act", "head": "l1", "vlm": "tiny"},
        values={f"framework.{ours}": config[theirs] for theirs, ours in OPTIONS.items()}
        | {
            "framework.backbone": "resnet18",
            "framework.normalization": folder.normalization(),
            "framework.picture_mean": pictures["mean"],
            "framework.picture_std": pictures["std"],
        },
        spec=spec,
        weights=table.to_ours(folder.weights(), str(folder.path / "model.safetensors")),
        statistics=folder.our_statistics(),
    )


def write(policy: Policy) -> Exported:
    framework: Any = policy.framework
    options = policy.config["framework"]
    problems = {
        "framework.backbone": (framework.vlm is None, "resnet18", "vlm"),
        "framework.instruction_token": (framework.tokenizer is None, False, True),
        "framework.obs_steps": (framework.obs_steps == 1, 1, framework.obs_steps),
        "head": (type(framework.head).__name__ == "L1", "l1", type(framework.head).__name__),
        "embodiments": (len(framework.embodiments) == 1, 1, len(framework.embodiments)),
    }
    for place, (fits, expected, found) in problems.items():
        if not fits:
            raise LibrobotError(
                f"lerobot's act cannot hold this policy: {place} must be {expected}, found {found}"
            )
    has_vae = framework.vae_encoder is not None
    length = framework.vae_positions.shape[1] if has_vae else 0
    table = weight_map(vae_length=length, width=framework.width)
    return Exported(
        config={theirs: options[ours] for theirs, ours in OPTIONS.items()}
        | {
            "type": "act",
            "n_obs_steps": 1,
            "n_action_steps": framework.horizon,
            "n_decoder_layers": len(framework.decoder.layers),
            "vision_backbone": "resnet18",
            "pretrained_backbone_weights": None,
            "normalization_mapping": mapping_of(framework.normalizer.modes) | {"VISUAL": "MEAN_STD"},
            "device": "cpu",
        },
        weights=table.to_theirs(framework.state_dict(), "act"),
        statistics=statistics_of(policy)
        | picture_statistics_of(framework.resnet.mean, framework.resnet.std, policy.spec.camera_names),
    )
