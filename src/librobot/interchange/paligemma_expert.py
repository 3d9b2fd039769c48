"""The tensors of openpi's PyTorch model, as lerobot's pi0 and pi0.5: PaliGemma and a Gemma expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from librobot.interchange.weights import Fused, Rule, WeightMap

EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
OUTPUT = "paligemma_with_expert.paligemma.lm_head.weight"
EXPERT_OUTPUT = "paligemma_with_expert.gemma_expert.lm_head.weight"
HEAD_DIM_OF_SIGLIP = 72  # So400m's; no tensor's shape tells
TOKENIZER = "google/paligemma-3b-pt-224"


def weight_map(*, pi05: bool, prefix: str = "") -> WeightMap:
    """`prefix` stands before all of their names: "model." in lerobot. Both names of the tied embedding must
    be there: see `with_tied`."""
    expert = f"{prefix}paligemma_with_expert.gemma_expert.model"
    norms = (
        [
            Rule(f"{expert}.layers.*.input_layernorm.dense.*", "expert.layers.*.attention_norm.linear.*"),
            Rule(f"{expert}.layers.*.post_attention_layernorm.dense.*", "expert.layers.*.mlp_norm.linear.*"),
            Rule(f"{expert}.norm.dense.*", "expert.norm.linear.*"),
        ]
        if pi05
        else [
            Rule(f"{expert}.layers.*.input_layernorm.weight", "expert.layers.*.attention_norm.plain.scale"),
            Rule(
                f"{expert}.layers.*.post_attention_layernorm.weight", "expert.layers.*.mlp_norm.plain.scale"
            ),
            Rule(f"{expert}.norm.weight", "expert.norm.plain.scale"),
        ]
    )
    tokens = (
        [Rule(f"{prefix}time_mlp_in.*", "time_mlp_in.*"), Rule(f"{prefix}time_mlp_out.*", "time_mlp_out.*")]
        if pi05
        else [
            Rule(f"{prefix}state_proj.*", "state_proj.*"),
            Fused(
                f"{prefix}action_time_mlp_in.weight", ("action_mlp_in.weight", "time_mlp_in.weight"), dim=1
            ),
            Rule(f"{prefix}action_time_mlp_in.bias", "action_mlp_in.bias"),
            Rule(f"{prefix}action_time_mlp_out.*", "action_time_mlp_out.*"),
        ]
    )

    def unused_output(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The expert's output layer, which predicts no words: nobody reads it, but strict readers want it."""
        words, width = theirs[prefix + EMBEDDING], theirs[f"{prefix}action_in_proj.bias"]
        return {prefix + EXPERT_OUTPUT: words.new_zeros(len(words), len(width))}

    return WeightMap(
        rules=[
            *norms,
            Rule(f"{expert}.layers.*.self_attn.*.weight", "expert.layers.*.attention.*.weight"),
            Rule(f"{expert}.layers.*.mlp.*_proj.weight", "expert.layers.*.mlp.*.weight"),
            *tokens,
            Rule(f"{prefix}action_in_proj.*", "action_in_proj.*"),
            Rule(f"{prefix}action_out_proj.*", "action_out_proj.*"),
            Rule(f"{prefix}paligemma_with_expert.paligemma.*", "vlm.model.*"),
        ],
        unused=[prefix + EXPERT_OUTPUT],
        made=unused_output,
    )


def with_tied(state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The embedding under both of its names: files hold it under one or both, and where they differ only the
    embedding was ever read."""
    named = {
        name if name.startswith(prefix) else prefix + name: tensor for name, tensor in state_dict.items()
    }
    embedding, output = prefix + EMBEDDING, prefix + OUTPUT
    held = named.get(embedding, named.get(output))
    return named if held is None else named | {embedding: held, output: held}


def backbone_files(weights: Mapping[str, Tensor], tokenizer: str) -> dict[str, str]:
    """What `VLM.files` gives for a PaliGemma with these tensors (by our names). `tokenizer` is a folder or a
    name of the model hub."""
    from transformers import PaliGemmaConfig, SiglipImageProcessor

    from librobot.vlms.loading import load_tokenizer, text_files
    from librobot.vlms.prompts import token_id

    words = load_tokenizer(tokenizer)
    sizes = backbone_sizes(weights)
    config = PaliGemmaConfig(**sizes)
    config.image_token_id = token_id(words, "<image>")
    side = sizes["vision_config"]["image_size"]
    return text_files(config, words, SiglipImageProcessor(size={"height": side, "width": side}))


def backbone_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """PaliGemma's configuration, from the shapes of tensors by our names."""
    text, vision = "vlm.model.model.language_model.", "vlm.model.model.vision_tower.vision_model."
    shape = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    vocabulary, hidden = shape[f"{text}embed_tokens.weight"]
    head_dim = shape[f"{text}layers.0.self_attn.k_proj.weight"][0]  # both Gemmas have one key-value head
    looks, _, patch, _ = shape[f"{vision}embeddings.patch_embedding.weight"]
    num_patches = shape[f"{vision}embeddings.position_embedding.weight"][0]
    projected = shape["vlm.model.model.multi_modal_projector.linear.weight"][0]
    return {
        "projection_dim": projected,
        "hidden_size": hidden,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": looks,
            "intermediate_size": shape[f"{vision}encoder.layers.0.mlp.fc1.weight"][0],
            "num_hidden_layers": count_layers(weights, f"{vision}encoder.layers."),
            "num_attention_heads": looks // HEAD_DIM_OF_SIGLIP,
            "image_size": round(num_patches**0.5) * patch,
            "patch_size": patch,
            "projection_dim": projected,
            "vision_use_head": False,
        },
        "text_config": {
            "model_type": "gemma",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": shape[f"{text}layers.0.mlp.gate_proj.weight"][0],
            "num_hidden_layers": count_layers(weights, f"{text}layers."),
            "num_attention_heads": shape[f"{text}layers.0.self_attn.q_proj.weight"][0] // head_dim,
            "num_key_value_heads": 1,
            "head_dim": head_dim,
        },
    }


def expert_values(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The expert's sizes as values over `framework=pi0` or `pi05`."""
    width, action_dim = weights["action_in_proj.weight"].shape
    mlp_width = weights["expert.layers.0.mlp.gate.weight"].shape[0]
    return {
        "framework.max_action_dim": action_dim,
        "framework.expert_width": width,
        "framework.expert_mlp_ratio": mlp_width // width,
    }


def with_ranges(statistics: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """Statistics with a range for the dimensions whose quantiles coincide: where none is known, the quantiles
    themselves."""
    made = {}
    for key, own in statistics.items():
        made[key] = dict(own)
        for ours, other in (("min", "q01"), ("max", "q99")):
            if ours not in own and other in own:
                made[key][ours] = own[other]
    return made


def count_layers(weights: Mapping[str, Tensor], beginning: str) -> int:
    found = {name[len(beginning) :].partition(".")[0] for name in weights if name.startswith(beginning)}
    return len(found)
