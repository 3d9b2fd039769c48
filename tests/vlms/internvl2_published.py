"""A small random InternVL2 in its published layout, and what its layers compute, from the definition."""

import json

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers.convert_slow_tokenizer import import_protobuf

import tiny_models
from librobot.types import Observation
from librobot.vlms.internlm2_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["▁", *LETTERS, "op", "en", "pe", "open", "th", "the", "▁the"]
TEXT = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
VISION = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 40}
HEAD_DIM, THETA = 8, 1e6


def build(option: str, **changes):
    torch.manual_seed(0)
    node = OmegaConf.create(tiny_models.node("vlm", option, **changes))
    return instantiate(node, _convert_="all").eval()


def observe(vlm, size=2, sides=((56, 56), (56, 56)), steps=1) -> Observation:
    draw = torch.Generator().manual_seed(1)
    images = {
        f"camera{i}": torch.randint(0, 256, (size, steps, 3, *side), generator=draw, dtype=torch.uint8)
        for i, side in enumerate(sides)
    }
    prompts = ["open the", "e"][:size]
    return Observation(
        images=images,
        image_mask={name: torch.ones(size, dtype=torch.bool) for name in images},
        state=torch.zeros(size, steps, 1),
        prompt=prompts,
        inputs=vlm.processor(prompts, images),
    )


# A random model in the published layout.


def sentencepiece_model() -> bytes:
    """Byte fallback, a few merges, and two unused pieces whose places the chat tokens take."""
    model = import_protobuf().ModelProto()
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    kinds = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    kinds += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    kinds += [(word, NORMAL) for word in WORDS]
    kinds += [("[UNUSED_TOKEN_0]", USER_DEFINED), ("[UNUSED_TOKEN_1]", USER_DEFINED)]
    for i, (text, kind) in enumerate(kinds):
        piece = model.pieces.add()
        piece.piece, piece.type, piece.score = text, kind, -float(i)
    return model.SerializeToString()


FIRST_WORD = 259
ADDED = {
    token: FIRST_WORD + len(WORDS) + i
    for i, token in enumerate(["<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>"])
}
VOCABULARY = max(ADDED.values()) + 1


def published_weights(language: str = "internlm2") -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw) / (shape[-1] if len(shape) > 1 else 10) ** 0.5

    d, e, wide = TEXT["hidden_size"], VISION["hidden_size"], 4 * VISION["hidden_size"]
    made = {
        "vision_model.embeddings.class_embedding": random(1, 1, e),
        "vision_model.embeddings.position_embedding": random(1, 17, e),
        "vision_model.embeddings.patch_embedding.weight": random(e, 3, 14, 14) / 14,
        "vision_model.embeddings.patch_embedding.bias": random(e),
        "mlp1.0.weight": 1 + random(wide),
        "mlp1.0.bias": random(wide),
        "mlp1.1.weight": random(d, wide),
        "mlp1.1.bias": random(d),
        "mlp1.3.weight": random(d, d),
        "mlp1.3.bias": random(d),
        "language_model.model.norm.weight": 1 + random(d),
    }
    for i in range(2):
        start = f"vision_model.encoder.layers.{i}."
        sizes = {"attn.qkv": (3 * e, e), "attn.proj": (e, e), "mlp.fc1": (40, e), "mlp.fc2": (e, 40)}
        for name, shape in sizes.items():
            made[f"{start}{name}.weight"], made[f"{start}{name}.bias"] = random(*shape), random(shape[0])
        for name in ("norm1", "norm2"):
            made[f"{start}{name}.weight"], made[f"{start}{name}.bias"] = 1 + random(e), random(e)
        made[f"{start}ls1"], made[f"{start}ls2"] = random(e), random(e)
    kv = TEXT["num_key_value_heads"] * HEAD_DIM
    for i in range(2):
        start = f"language_model.model.layers.{i}."
        if language == "internlm2":
            sizes = {"attention.wqkv": (d + 2 * kv, d), "attention.wo": (d, d)}
            sizes |= {"feed_forward.w1": (48, d), "feed_forward.w3": (48, d), "feed_forward.w2": (d, 48)}
            norms = ("attention_norm", "ffn_norm")
        else:
            sizes = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
            made |= {f"{start}{name}.bias": random(shape[0]) for name, shape in sizes.items()}
            sizes |= {"self_attn.o_proj": (d, d), "mlp.gate_proj": (48, d), "mlp.up_proj": (48, d)}
            sizes |= {"mlp.down_proj": (d, 48)}
            norms = ("input_layernorm", "post_attention_layernorm")
        made |= {f"{start}{name}.weight": random(*shape) for name, shape in sizes.items()}
        made |= {f"{start}{name}.weight": 1 + random(d) for name in norms}
    names = (
        ("model.tok_embeddings", "output") if language == "internlm2" else ("model.embed_tokens", "lm_head")
    )
    return made | {f"language_model.{name}.weight": random(VOCABULARY, d) for name in names}


def published_config(architecture: str = "InternLM2ForCausalLM") -> dict:
    return {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "downsample_ratio": 0.5,
        "force_image_size": 56,
        "ps_version": "v2",
        "select_layer": -1,
        "llm_config": {
            **TEXT,
            "architectures": [architecture],
            "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
            "bias": False,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "num_hidden_layers": 2,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {"factor": 2.0, "type": "dynamic"},
            "rope_theta": THETA,
            "tie_word_embeddings": False,
            "vocab_size": VOCABULARY,
        },
        "vision_config": {
            **VISION,
            "attention_dropout": 0.0,
            "drop_path_rate": 0.1,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "image_size": 56,
            "initializer_factor": 0.1,
            "layer_norm_eps": 1e-6,
            "norm_type": "layer_norm",
            "num_hidden_layers": 2,
            "patch_size": 14,
            "qk_normalization": False,
            "qkv_bias": True,
        },
    }


def publish(folder, weights=None, config=None):
    """Two safetensors files with an index, as the larger repositories have them."""
    weights = weights or published_weights()
    half = len(weights) // 2
    files = {"model-00001-of-00002.safetensors": list(weights)[:half]}
    files["model-00002-of-00002.safetensors"] = list(weights)[half:]
    for name, keys in files.items():
        save_file({key: weights[key].contiguous() for key in keys}, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, keys in files.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config or published_config()))
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    listed = {str(i): {"content": token, "special": True} for token, i in ADDED.items()}
    tokenizer = {"tokenizer_class": "InternLM2Tokenizer", "added_tokens_decoder": listed}
    tokenizer |= {"auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return str(folder)


def picture_features(w: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """InternViT, pixel shuffle and projector: (n, 3, 56, 56) normalised pixels -> (n, 4, d)."""
    start = "vision_model.embeddings."
    patches = F.conv2d(
        pixels, w[start + "patch_embedding.weight"], w[start + "patch_embedding.bias"], stride=14
    ).flatten(2)
    x = torch.cat((w[start + "class_embedding"].expand(len(pixels), -1, -1), patches.transpose(1, 2)), dim=1)
    x = x + w[start + "position_embedding"]
    e, heads = VISION["hidden_size"], VISION["num_attention_heads"]
    for i in range(2):
        layer = {k.removeprefix(f"vision_model.encoder.layers.{i}."): v for k, v in w.items()}
        h = F.layer_norm(x, (e,), layer["norm1.weight"], layer["norm1.bias"], 1e-6)
        qkv = F.linear(h, layer["attn.qkv.weight"], layer["attn.qkv.bias"])
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.split(e, dim=-1))
        attended = (q @ k.mT / (e // heads) ** 0.5).softmax(-1) @ v
        out = F.linear(
            attended.transpose(1, 2).flatten(2), layer["attn.proj.weight"], layer["attn.proj.bias"]
        )
        x = x + layer["ls1"] * out
        h = F.layer_norm(x, (e,), layer["norm2.weight"], layer["norm2.bias"], 1e-6)
        h = F.gelu(F.linear(h, layer["mlp.fc1.weight"], layer["mlp.fc1.bias"]))
        x = x + layer["ls2"] * F.linear(h, layer["mlp.fc2.weight"], layer["mlp.fc2.bias"])
    grid = x[:, 1:].unflatten(1, (4, 4))
    # Version 2 of the pixel shuffle: each 2 x 2 patches, row by row, become the channels of one token.
    blocks = [
        torch.cat([grid[:, 2 * r + i, 2 * c + j] for i in range(2) for j in range(2)], dim=-1)
        for r in range(2)
        for c in range(2)
    ]
    x = torch.stack(blocks, dim=1)
    x = F.layer_norm(x, x.shape[-1:], w["mlp1.0.weight"], w["mlp1.0.bias"])
    x = F.gelu(F.linear(x, w["mlp1.1.weight"], w["mlp1.1.bias"]))
    return F.linear(x, w["mlp1.3.weight"], w["mlp1.3.bias"])


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (heads, l, e): channel i turns together with channel i + e / 2."""
    turns = THETA ** (torch.arange(0, HEAD_DIM, 2, dtype=x.dtype) / HEAD_DIM)
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] / turns
    one, other = x.chunk(2, dim=-1)
    return torch.cat(
        (one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()), -1
    )


def internlm2(w: dict[str, torch.Tensor], x: torch.Tensor):
    """Embedded tokens (l, d) -> hidden states and keys of every layer."""
    hidden, keys = [x], []
    causal = torch.full((len(x), len(x)), -torch.inf).triu(1)
    for i in range(2):
        layer = {k.removeprefix(f"language_model.model.layers.{i}."): v for k, v in w.items()}
        fused = F.linear(rms_norm(x, layer["attention_norm.weight"]), layer["attention.wqkv.weight"])
        outputs, kept = [], []
        for group in fused.split(4 * HEAD_DIM, dim=-1):  # two query heads, their key, their value
            first, second, key, value = group.split(HEAD_DIM, dim=-1)
            key = rotate(key[None])
            scores = rotate(torch.stack((first, second))) @ key.mT / HEAD_DIM**0.5 + causal
            outputs += list(scores.softmax(-1) @ value)
            kept.append(key[0])
        keys.append(torch.stack(kept))
        x = x + F.linear(torch.cat(outputs, dim=-1), layer["attention.wo.weight"])
        h = rms_norm(x, layer["ffn_norm.weight"])
        gate = F.silu(F.linear(h, layer["feed_forward.w1.weight"]))
        x = x + F.linear(gate * F.linear(h, layer["feed_forward.w3.weight"]), layer["feed_forward.w2.weight"])
        hidden.append(x)
    hidden[-1] = rms_norm(x, w["language_model.model.norm.weight"])
    return hidden, keys


def tiny_node(option: str) -> dict:
    node = tiny_models.node("vlm", option)
    node.pop("_target_")
    return node
