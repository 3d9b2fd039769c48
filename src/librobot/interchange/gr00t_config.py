"""What GR00T's config.json says, as values over `framework=groot_n15` and `framework=groot_n17`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from librobot.errors import LibrobotError
from librobot.interchange.files import read_json
from librobot.vlms.loading import hub_errors, load_config, load_tokenizer, text_files

TOKENIZER_N17 = "nvidia/Cosmos-Reason2-2B"

PUBLISHED_N17: dict[str, Any] = {
    "select_layer": 16,
    "max_state_dim": 132,
    "max_action_dim": 132,
    "action_horizon": 40,
    "hidden_size": 1024,
    "input_embedding_dim": 1536,
    "max_num_embodiments": 32,
    "diffusion_model_cfg": {
        "num_layers": 32,
        "num_attention_heads": 32,
        "attention_head_dim": 48,
        "output_dim": 1024,
        "dropout": 0.2,
        "interleave_self_attention": True,
    },
    "vl_self_attention_cfg": {"num_layers": 4, "num_attention_heads": 32},
    "state_dropout_prob": 0.2,
}
"""config.json of nvidia/GR00T-N1.7-3B, as far as it differs from what `head_values` takes for granted."""


def head_values(config: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """The action head's sizes. Raises LibrobotError for a variant that no release has."""
    dit, fusion = config["diffusion_model_cfg"], config.get("vl_self_attention_cfg") or {}
    for key, found, expected in (
        ("diffusion_model_cfg.norm_type", dit.get("norm_type", "ada_norm"), "ada_norm"),
        ("diffusion_model_cfg.interleave_self_attention", dit.get("interleave_self_attention"), True),
        ("diffusion_model_cfg.positional_embeddings", dit.get("positional_embeddings"), None),
        ("diffusion_model_cfg.output_dim", dit["output_dim"], config["hidden_size"]),
        (
            "input_embedding_dim",
            config["input_embedding_dim"],
            dit["num_attention_heads"] * dit["attention_head_dim"],
        ),
        ("add_pos_embed", config.get("add_pos_embed", True), True),
        ("use_vlln", config.get("use_vlln", True), True),
        ("noise_s", config.get("noise_s", 0.999), 0.999),
        ("apply_sincos_state_encoding", config.get("apply_sincos_state_encoding", False), False),
    ):
        if found != expected:
            raise LibrobotError(f"{place}: {key} must be {expected}, as in the releases, found {found}")
    return {
        "framework.horizon": config["action_horizon"],
        "framework.max_state_dim": config["max_state_dim"],
        "framework.max_action_dim": config.get("max_action_dim", config.get("action_dim")),
        "framework.num_embodiments": config.get("max_num_embodiments", 32),
        "framework.width": config["input_embedding_dim"],
        "framework.mlp_width": config["hidden_size"],
        "framework.num_dit_layers": dit["num_layers"],
        "framework.num_heads": dit["num_attention_heads"],
        "framework.dropout": dit.get("dropout", 0.2),
        "framework.num_fusion_layers": fusion.get("num_layers", 0),
        "framework.num_fusion_heads": fusion.get("num_attention_heads", 32),
        "framework.max_positions": config.get("max_seq_len", 1024),
        "framework.num_time_buckets": config.get("num_timestep_buckets", 1000),
        "head.beta_alpha": config.get("noise_beta_alpha", 1.5),
        "head.beta_beta": config.get("noise_beta_beta", 1.0),
        "head.num_steps": config.get("num_inference_timesteps", 4),
    }


def n17_values(config: Mapping[str, Any], place: Path) -> dict[str, Any]:
    alternate = config.get("use_alternate_vl_dit", True)
    return {
        **head_values(config, place),
        "framework.obs_steps": config.get("state_history_length", 1),
        "framework.cross_attention": "text_and_pictures" if alternate else "all",
        "framework.text_every": config.get("attend_text_every_n_blocks", 2),
        "framework.state_dropout": config.get("state_dropout_prob", 0.0),
        "vlm.num_layers": config["select_layer"],
    }


def n15_values(config: Mapping[str, Any], place: Path) -> dict[str, Any]:
    head, backbone = config["action_head_cfg"], config["backbone_cfg"]
    if backbone.get("project_to_dim") is not None:
        raise LibrobotError(
            f"{place}: backbone_cfg.project_to_dim must be null, as in N1.5, found "
            f"{backbone['project_to_dim']}; N1's projection is not read"
        )
    return {
        **head_values(head, place),
        "framework.num_future_tokens": head.get("num_target_vision_tokens", 32),
        "vlm.num_layers": backbone["select_layer"],
    }


def qwen_files(source: str, num_layers: int) -> dict[str, str]:
    """The files of N1.7's backbone: `source` is a hub name or a folder with its configuration, tokenizer and
    picture processor."""
    from transformers import AutoImageProcessor, Qwen3VLConfig

    config = load_config(source, Qwen3VLConfig)
    config.get_text_config().num_hidden_layers = num_layers
    with hub_errors(source):
        pictures = AutoImageProcessor.from_pretrained(source, backend="torchvision")
    return text_files(config, load_tokenizer(source), pictures)


def eagle_files(source: str, num_layers: int) -> dict[str, str]:
    """The files of N1.5's backbone: `source` is a folder with Eagle 2.5's tokenizer. Its config.json, where
    there is one, gives the sizes, else they are the published ones."""
    from transformers import LlavaConfig

    from librobot.config.compose import compose, resolve
    from librobot.vlms.eagle import Eagle25
    from librobot.vlms.prompts import token_id

    sizes = resolve(compose(["vlm=eagle25", "logger=none"]))["vlm"]["config"]
    given = Path(source) / "config.json"
    if given.is_file():
        found = read_json(given)
        sizes = sizes | {key: found[key] for key in ("vision_config", "text_config") if key in found}
    config = LlavaConfig(**sizes)
    config.get_text_config().num_hidden_layers = num_layers
    tokenizer = load_tokenizer(source)
    Eagle25.set_token(config, "image_token_id", token_id(tokenizer, Eagle25.template.image_token))
    return text_files(config, tokenizer, Eagle25.default_picture_processor(config))
