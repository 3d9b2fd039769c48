"""lerobot's SmolVLA (`"type": "smolvla"`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from librobot.errors import LibrobotError
from librobot.heads.flow_matching import FlowMatching
from librobot.interchange.base import Imported, ImportOptions
from librobot.interchange.lerobot.folder import (
    NORMALIZER,
    Exported,
    LeRobotFolder,
    mapping_of,
    statistics_of,
)
from librobot.interchange.weights import Rule, WeightMap
from librobot.policy import Policy
from librobot.vlms.smolvla import SmolVLABackbone

BOTH = "model.vlm_with_expert."
LAYER = {  # of the expert
    "input_layernorm.*": "attention_norm.*",
    "self_attn.*": "attention.*",
    "post_attention_layernorm.*": "mlp_norm.*",
    "mlp.gate_proj.*": "mlp.gate.*",
    "mlp.up_proj.*": "mlp.up.*",
    "mlp.down_proj.*": "mlp.down.*",
}


def weight_map() -> WeightMap:
    """The table of tensor names."""
    return WeightMap(
        [
            Rule(f"{BOTH}vlm.*", "vlm.model.*"),
            *(Rule(f"{BOTH}lm_expert.layers.*.{a}", f"expert.*.{b}") for a, b in LAYER.items()),
            Rule(f"{BOTH}lm_expert.norm.*", "expert_norm.*"),
            Rule("model.action_time_mlp_in.*", "action_time_mlp.0.*"),
            Rule("model.action_time_mlp_out.*", "action_time_mlp.2.*"),
            *(
                Rule(f"model.{name}.*", f"{name}.*")
                for name in ("state_proj", "action_in_proj", "action_out_proj")
            ),
        ]
    )


def read(folder: LeRobotFolder, options: ImportOptions) -> Imported:
    config = folder.config
    folder.expect(
        n_obs_steps=1,
        add_image_special_tokens=False,
        adapt_to_pi_aloha=False,
        use_delta_joint_actions_aloha=False,
        min_period=4e-3,
        max_period=4.0,
    )
    weights = weight_map().to_ours(folder.weights(), str(folder.path / "model.safetensors"))
    layers = num_layers(weights, "vlm.model.model.text_model.layers.")
    if num_layers(weights, "expert.") != layers:
        raise LibrobotError(
            f"{folder.path / 'config.json'}: num_expert_layers must be -1, or that of the backbone's layers, "
            f"found {config['num_expert_layers']}; librobot's expert has one for each"
        )
    spec = folder.spec(options)
    # Empty cameras are always masked: whoever leaves them out sees the same.
    real = [camera.name for camera in spec.cameras if not camera.name.startswith("empty_camera_")]
    hidden = weights["state_proj.weight"].shape[0]
    return Imported(
        choices={"framework": "smolvla", "vlm": "smolvla", "head": "flow_matching"},
        values={
            "framework.horizon": config["chunk_size"],
            "framework.normalization": folder.normalization(),
            "framework.max_state_dim": config["max_state_dim"],
            "framework.max_action_dim": config["max_action_dim"],
            "framework.expert_width_share": weights["expert_norm.weight"].shape[0] / hidden,
            "framework.self_attention_every": self_attention_every(config),
            "framework.freeze": ["vlm"] if config["train_expert_only"] else [],
            "vlm.checkpoint": config["vlm_model_name"],
            "vlm.num_layers": layers,
            "vlm.max_prompt_tokens": config["tokenizer_max_length"] - 1,  # its line break
            "head.num_steps": config["num_steps"],
        },
        spec=spec.with_cameras(real),
        weights=weights,
        statistics=folder.our_statistics(),
        files=backbone_files(options.tokenizer or config["vlm_model_name"], layers),
    )


def self_attention_every(config: Mapping[str, Any]) -> int:
    if "cross" not in config["attention_mode"]:
        return 1
    return max(config["self_attn_every_n_layers"], 0)


def num_layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in weights if name.startswith(prefix)})


def backbone_files(source: str, layers: int) -> dict[str, str]:
    """What `VLM.files` gives: configuration, tokenizer and picture processor of `source`, a folder or a name
    of the model hub, with the layers that are kept."""
    from transformers import AutoConfig
    from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor

    from librobot.vlms.loading import hub_errors, load_tokenizer, text_files

    with hub_errors(source):
        config = AutoConfig.from_pretrained(source)
    config.text_config.num_hidden_layers = layers
    side = {"longest_edge": config.vision_config.image_size}
    pictures = SmolVLMImageProcessor(size=side, max_image_size=side, do_image_splitting=False)
    return text_files(config, load_tokenizer(source), pictures)


def write(policy: Policy) -> Exported:
    framework, head, vlm = policy.framework, policy.framework.head, policy.framework.vlm
    options = policy.config["framework"]
    convention = getattr(head, "time_convention", None)
    problems = {
        "vlm": (isinstance(vlm, SmolVLABackbone), "smolvla", type(vlm).__name__),
        "head": (type(head) is FlowMatching, "flow_matching", type(head).__name__),
        "head.time_convention": (convention == "noise_at_one", "noise_at_one", convention),
        "framework.obs_steps": (framework.obs_steps == 1, 1, framework.obs_steps),
        "framework.expert_mlp_width": (
            options["expert_mlp_width"] is None,
            None,
            options["expert_mlp_width"],
        ),
        "the robot's state": (bool(policy.spec.state_dim), "some dimensions", "none"),
        "embodiments": (len(framework.embodiments) == 1, 1, len(framework.embodiments)),
    }
    for place, (fits, expected, found) in problems.items():
        if not fits:
            raise LibrobotError(
                f"lerobot's smolvla cannot hold this policy: {place} must be {expected}, found {found}"
            )
    assert isinstance(vlm, SmolVLABackbone)
    assert isinstance(head, FlowMatching)
    processor: Any = vlm.processor
    length = processor.max_prompt_tokens + 1
    side = vlm.model.config.vision_config.image_size
    name = policy.config["vlm"].get("checkpoint") or "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
    padding = {"padding": "longest", "padding_side": "right", "truncation": True, "task_key": "task"}
    return Exported(
        config={
            "type": "smolvla",
            "n_obs_steps": 1,
            "chunk_size": framework.horizon,
            "n_action_steps": framework.num_future_actions,
            "max_state_dim": framework.state_width,
            "max_action_dim": framework.action_width,
            "resize_imgs_with_padding": [side, side],
            "tokenizer_max_length": length,
            "num_steps": head.num_steps,
            "train_expert_only": "vlm" in options["freeze"],
            "freeze_vision_encoder": "vlm" in options["freeze"],
            "vlm_model_name": name,
            "load_vlm_weights": False,
            "attention_mode": "self_attn" if options["self_attention_every"] == 1 else "cross_attn",
            "num_expert_layers": -1,
            "num_vlm_layers": len(vlm.blocks),
            "self_attn_every_n_layers": options["self_attention_every"] or -1,
            "expert_width_multiplier": options["expert_width_share"],
            "normalization_mapping": mapping_of(framework.normalizer.modes),
            "device": "cpu",
        },
        weights=weight_map().to_theirs(framework.state_dict(), "smolvla"),
        statistics=statistics_of(policy),
        preprocessor=[
            {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
            {"registry_name": "to_batch_processor", "config": {}},
            {"registry_name": "smolvla_new_line_processor", "config": {}},
            {
                "registry_name": "tokenizer_processor",
                "config": {"tokenizer_name": name, "max_length": length, **padding},
            },
            {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
            {"registry_name": NORMALIZER},
        ],
    )
