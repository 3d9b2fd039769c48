"""InternVL's published layout (`model_type` internvl_chat) to transformers' InternVL classes.

Such a checkpoint holds an InternViT (`vision_model`), a projector (`mlp1`) and a language model: InternLM2
(InternVL2), Qwen2 (InternVL3) or Llama. InternLM2 is a Llama with other names and one fused `wqkv`, whose
rows are, for every key-value head, its query heads, then its key, then its value (arXiv 2403.17297).

InternLM2's dynamic rotary scaling is kept: up to `max_position_embeddings` (32768) positions it is the plain
embedding, beyond them the base grows with the length. Stochastic depth, a training option of InternViT, has
no counterpart in transformers' classes and is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers import PreTrainedTokenizerFast as FastTokenizer

from librobot.errors import LibrobotError
from librobot.nn.pretrained import stays_unread
from librobot.nn.stored import stored_tensors
from librobot.vlms.internlm2_tokenizer import build_tokenizer
from librobot.vlms.loading import find_file, hub_errors, load_tokenizer, read_json, weight_files

LANGUAGE_MODELS = {"InternLM2ForCausalLM": "llama", "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}

TEXT_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "bos_token_id",
)  # fmt: skip

VISION_OPTIONS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "hidden_act": "hidden_act",
    "norm_type": "norm_type",
    "layer_norm_eps": "layer_norm_eps",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "num_channels",
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
    "attention_dropout": "attention_dropout",
    "dropout": "projection_dropout",
    "initializer_factor": "layer_scale_init_value",
}

VISION_LAYER = r"vision_model\.encoder\.layers\.(\d+)\."
TEXT_LAYER = r"language_model\.model\.layers\.(\d+)\."
# The first fitting pattern names a tensor's place in transformers' model.
NAMES = [
    (r"vision_model\.embeddings\.class_embedding", r"model.vision_tower.embeddings.cls_token"),
    (r"vision_model\.embeddings\.position_embedding", r"model.vision_tower.embeddings.position_embeddings"),
    (
        r"vision_model\.embeddings\.patch_embedding\.(\w+)",
        r"model.vision_tower.embeddings.patch_embeddings.projection.\1",
    ),
    (
        VISION_LAYER + r"attn\.proj\.(\w+)",
        r"model.vision_tower.encoder.layer.\1.attention.projection_layer.\2",
    ),
    (VISION_LAYER + r"attn\.(.+)", r"model.vision_tower.encoder.layer.\1.attention.\2"),
    (VISION_LAYER + r"norm1\.(\w+)", r"model.vision_tower.encoder.layer.\1.layernorm_before.\2"),
    (VISION_LAYER + r"norm2\.(\w+)", r"model.vision_tower.encoder.layer.\1.layernorm_after.\2"),
    (VISION_LAYER + r"ls([12])", r"model.vision_tower.encoder.layer.\1.lambda_\2"),
    (VISION_LAYER + r"(mlp\..+)", r"model.vision_tower.encoder.layer.\1.\2"),
    (r"mlp1\.0\.(\w+)", r"model.multi_modal_projector.layer_norm.\1"),
    (r"mlp1\.1\.(\w+)", r"model.multi_modal_projector.linear_1.\1"),
    (r"mlp1\.3\.(\w+)", r"model.multi_modal_projector.linear_2.\1"),
    (r"language_model\.model\.tok_embeddings\.(\w+)", r"model.language_model.embed_tokens.\1"),
    (TEXT_LAYER + r"attention\.wo\.(\w+)", r"model.language_model.layers.\1.self_attn.o_proj.\2"),
    (TEXT_LAYER + r"attention\.(wqkv\..+)", r"model.language_model.layers.\1.self_attn.\2"),
    (TEXT_LAYER + r"feed_forward\.w1\.(\w+)", r"model.language_model.layers.\1.mlp.gate_proj.\2"),
    (TEXT_LAYER + r"feed_forward\.w2\.(\w+)", r"model.language_model.layers.\1.mlp.down_proj.\2"),
    (TEXT_LAYER + r"feed_forward\.w3\.(\w+)", r"model.language_model.layers.\1.mlp.up_proj.\2"),
    (TEXT_LAYER + r"attention_norm\.(\w+)", r"model.language_model.layers.\1.input_layernorm.\2"),
    (TEXT_LAYER + r"ffn_norm\.(\w+)", r"model.language_model.layers.\1.post_attention_layernorm.\2"),
    (r"language_model\.(?:output|lm_head)\.(\w+)", r"lm_head.\1"),
    (r"language_model\.model\.(.+)", r"model.language_model.\1"),
]


def published_config(checkpoint: str) -> dict[str, Any] | None:
    """The configuration of a checkpoint in the published layout, None for any other."""
    config = read_json(checkpoint, "config.json")
    return config if config.get("model_type") == "internvl_chat" else None


def convert_config(checkpoint: str, published: Mapping[str, Any]) -> InternVLConfig:
    """transformers' configuration of a published one."""
    text, vision = published["llm_config"], published["vision_config"]
    architecture = text["architectures"][0]
    if architecture not in LANGUAGE_MODELS:
        raise LibrobotError(
            f"vlm.checkpoint={checkpoint}: the language model is {architecture}; those that can be read are "
            f"{', '.join(LANGUAGE_MODELS)}"
        )
    for name, expected in (("ps_version", "v2"), ("select_layer", -1)):
        if published.get(name, expected) != expected:
            raise LibrobotError(
                f"vlm.checkpoint={checkpoint}: {name} in config.json must be {expected!r}, found "
                f"{published[name]!r}; that is an earlier generation than InternVL2"
            )
    tokens = added_tokens(checkpoint)
    for token in ("<IMG_CONTEXT>", "<|im_end|>"):
        if token not in tokens:
            raise LibrobotError(
                f"vlm.checkpoint={checkpoint}: no token {token} in tokenizer.json, added_tokens.json or "
                f"tokenizer_config.json; add the published tokenizer files to the folder"
            )
    tied = bool(text.get("tie_word_embeddings", False))
    scaling = dict(text.get("rope_scaling") or {})
    rope_type = scaling.pop("type", scaling.pop("rope_type", "default"))
    made_text: dict[str, Any] = {name: text[name] for name in TEXT_SIZES if name in text}
    made_text |= {
        "model_type": LANGUAGE_MODELS[architecture],
        "eos_token_id": tokens["<|im_end|>"],
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": rope_type, "rope_theta": float(text["rope_theta"]), **scaling},
    }
    if architecture == "InternLM2ForCausalLM":
        made_text |= {
            "attention_bias": bool(text.get("bias", False)),
            "pad_token_id": text.get("pad_token_id"),
        }
    ratio = published.get("downsample_ratio", 0.5)
    side = picture_size(published) // vision["patch_size"]
    made: dict[str, Any] = {
        "text_config": made_text,
        "vision_config": {new: vision[old] for old, new in VISION_OPTIONS.items() if old in vision},
        "image_token_id": tokens["<IMG_CONTEXT>"],
        "image_seq_length": int((side * ratio) ** 2),
        "downsample_ratio": ratio,
        "tie_word_embeddings": tied,
    }
    return InternVLConfig(**made)


def picture_size(published: Mapping[str, Any]) -> int:
    """Side of a picture (or tile) in pixels."""
    return published.get("force_image_size") or published["vision_config"]["image_size"]


def added_tokens(checkpoint: str) -> dict[str, int]:
    """Special tokens beside the tokenizer's vocabulary, and their ids."""
    fast = read_json(checkpoint, "tokenizer.json").get("added_tokens", [])
    listed = read_json(checkpoint, "tokenizer_config.json").get("added_tokens_decoder", {})
    made = {token["content"]: token["id"] for token in fast} | read_json(checkpoint, "added_tokens.json")
    return made | {token["content"]: int(i) for i, token in listed.items()}


def published_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, without running code that it holds."""
    if find_file(checkpoint, "vocab.json"):  # Qwen2's, a class of transformers
        return load_tokenizer(checkpoint)
    if find_file(checkpoint, "tokenizer.json"):
        with hub_errors(checkpoint):
            return FastTokenizer.from_pretrained(checkpoint)
    pieces = find_file(checkpoint, "tokenizer.model")
    if pieces is None:
        raise LibrobotError(
            f"vlm.checkpoint={checkpoint}: no tokenizer; expected tokenizer.json or tokenizer.model beside "
            f"config.json, as the published repository has them"
        )
    config = read_json(checkpoint, "tokenizer_config.json")
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    for role in roles:
        found = config.get(role, roles[role])
        roles[role] = found["content"] if isinstance(found, dict) else found
    return build_tokenizer(pieces, added_tokens(checkpoint), roles)


def convert_tensor(
    name: str, tensor: Tensor, heads_per_group: int, head_dim: int
) -> Iterator[tuple[str, Tensor]]:
    """Names and values in transformers' model of one published tensor.

    `heads_per_group` query heads share a key and a value of `head_dim` rows. Raises KeyError for an unknown
    name, LibrobotError where the heads do not fit.
    """
    for pattern, replacement in NAMES:
        if match := re.fullmatch(pattern, name):
            new = match.expand(replacement)
            break
    else:
        raise KeyError(name)
    if ".attention.qkv." in new:
        for part, value in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
            yield new.replace(".qkv.", f".{part}."), value
    elif ".self_attn.wqkv." in new:
        rows = (heads_per_group + 2) * head_dim
        if len(tensor) % rows:
            raise LibrobotError(
                f"{name} has {len(tensor)} rows, by config.json's numbers of heads they must be a multiple "
                f"of {rows}; the configuration is of another model"
            )
        groups = tensor.unflatten(0, (-1, heads_per_group + 2, head_dim))
        parts = {"q_proj": groups[:, :-2], "k_proj": groups[:, -2], "v_proj": groups[:, -1]}
        for part, value in parts.items():
            yield new.replace(".wqkv.", f".{part}."), value.reshape(-1, *tensor.shape[1:])
    else:
        yield new, tensor


@torch.no_grad()
def load_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """Fill `model` from the published files, one tensor at a time, in the model's own dtype; where published
    weights are to stay unread, put the unread tensors in the places of its own."""
    text = model.config.get_text_config()
    heads_per_group = text.num_attention_heads // text.num_key_value_heads
    head_dim = text.hidden_size // text.num_attention_heads
    missing = dict(model.named_parameters())  # a tied output layer is listed once
    unknown: list[str] = []
    paths = weight_files(checkpoint)
    if not paths:
        raise LibrobotError(
            f"vlm.checkpoint={checkpoint}: no model.safetensors; expected the safetensors files of the "
            f"published repository"
        )
    for name, tensor in stored_tensors(paths).items():
        try:
            whole = tensor if stays_unread() else tensor.read()
            parts = list(convert_tensor(name, whole, heads_per_group, head_dim))
        except KeyError:
            unknown.append(name)
            continue
        for new, value in parts:
            if new == "lm_head.weight" and model.config.tie_word_embeddings:
                continue
            if new.endswith("rotary_emb.inv_freq"):
                continue
            if new not in missing:
                unknown.append(name)
            elif missing[new].shape != value.shape:
                raise LibrobotError(
                    f"vlm.checkpoint={checkpoint}: {name} gives {new} the shape "
                    f"{tuple(value.shape)}, config.json asks for {tuple(missing[new].shape)}"
                )
            elif stays_unread():
                own, _, last = new.rpartition(".")
                setattr(model.get_submodule(own), last, nn.Parameter(value.to(missing.pop(new).dtype)))
            else:
                missing.pop(new).copy_(value)
    if missing or unknown:
        raise LibrobotError(
            f"vlm.checkpoint={checkpoint}: the weights do not fit config.json; without a value: "
            f"{', '.join(list(missing)[:4]) or 'none'}; without a place: {', '.join(unknown[:4]) or 'none'}"
        )
