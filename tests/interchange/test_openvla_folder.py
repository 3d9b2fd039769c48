"""A folder in OpenVLA's layout, at a small size with random weights, becomes a policy."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast as FastTokenizer

import tiny_models
from librobot.errors import LibrobotError
from librobot.interchange.base import ImportOptions, import_checkpoint
from librobot.interchange.openvla import crops, weight_map
from librobot.policy import Policy
from librobot.vlms.prismatic_vision import VisionTransformer

DINO = {"hidden_size": 32, "num_layers": 3, "num_heads": 2, "mlp_width": 64, "num_registers": 2}
DINO |= {"layer_scale": True}
SIGLIP = {"hidden_size": 24, "num_layers": 3, "num_heads": 2, "mlp_width": 40}
WIDTH = 32
STATISTICS = {
    part: {
        name: (np.arange(dim) * 0.1 + shift).tolist()
        for name, shift in (("mean", 0), ("std", 1), ("min", -3), ("max", 3), ("q01", -2), ("q99", 2))
    }
    for part, dim in (("action", 7), ("proprio", 8))
}


def config() -> dict:
    return {
        "model_type": "openvla",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "image_sizes": [28, 28],
        "dino": DINO,
        "siglip": SIGLIP,
        "norm_stats": {"bridge": STATISTICS, "other": STATISTICS},
        "text_config": {
            "model_type": "llama",
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 32_064,
        },
    }


def block(width: int, inner: int, scale: bool) -> dict[str, tuple[int, ...]]:
    shapes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    shapes |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner), "norm1": (width,), "norm2": (width,)}
    made = {f"{n}.weight": s for n, s in shapes.items()} | {f"{n}.bias": s[:1] for n, s in shapes.items()}
    return made | ({"ls1.scale_factor": (width,), "ls2.scale_factor": (width,)} if scale else {})


def vision(sizes: dict) -> dict[str, tuple[int, ...]]:
    """timm's names, the unused last layer among them."""
    width = sizes["hidden_size"]
    made = {"patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,)}
    made |= {"pos_embed": (1, 4, width), "norm.weight": (width,), "norm.bias": (width,)}
    if "num_registers" in sizes:
        made |= {"cls_token": (1, 1, width), "reg_token": (1, sizes["num_registers"], width)}
    else:
        made |= {"attn_pool.latent": (1, 1, width)}
    for i in range(sizes["num_layers"]):
        own = block(width, sizes["mlp_width"], "layer_scale" in sizes)
        made |= {f"blocks.{i}.{name}": shape for name, shape in own.items()}
    return made


def mlp(names: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """Linear layers by name: (out, in)."""
    return {f"{n}.weight": s for n, s in names.items()} | {f"{n}.bias": s[:1] for n, s in names.items()}


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def published() -> dict[str, torch.Tensor]:
    seen = DINO["hidden_size"] + SIGLIP["hidden_size"]
    shapes = {f"vision_backbone.featurizer.{n}": s for n, s in vision(DINO).items()}
    shapes |= {f"vision_backbone.fused_featurizer.{n}": s for n, s in vision(SIGLIP).items()}
    layers = {"fc1": (4 * seen, seen), "fc2": (WIDTH, 4 * seen), "fc3": (WIDTH, WIDTH)}
    shapes |= {f"projector.{n}": s for n, s in mlp(layers).items()}
    start = "language_model.model."
    shapes |= {
        f"{start}embed_tokens.weight": (32_064, WIDTH),
        "language_model.lm_head.weight": (32_064, WIDTH),
    }
    shapes |= {f"{start}norm.weight": (WIDTH,)}
    for i in range(2):
        own = {f"self_attn.{n}_proj": (WIDTH, WIDTH) for n in "qkvo"}
        own |= {"mlp.gate_proj": (48, WIDTH), "mlp.up_proj": (48, WIDTH), "mlp.down_proj": (WIDTH, 48)}
        own |= {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
        shapes |= {f"{start}layers.{i}.{n}.weight": s for n, s in own.items()}
    return filled(shapes)


def tokenizer() -> FastTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"filler{i}" for i in range(32_000 - len(alphabet)))]
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<pad>"])
    return FastTokenizer(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


def write(folder, *, oft: bool = False):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config()))
    save_file(published(), folder / "model.safetensors")
    tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config()))
    if oft:
        head = mlp({"fc1": (WIDTH, 7 * WIDTH), "fc2": (7, WIDTH)})
        head |= {f"layer_norm1.{n}": (7 * WIDTH,) for n in ("weight", "bias")}
        head |= {f"layer_norm2.{n}": (WIDTH,) for n in ("weight", "bias")}
        for i in range(2):
            norm = {f"mlp_resnet_blocks.{i}.ffn.0.{n}": (WIDTH,) for n in ("weight", "bias")}
            head |= norm | mlp({f"mlp_resnet_blocks.{i}.ffn.1": (WIDTH, WIDTH)})
        named = {f"module.model.{name}": value for name, value in filled(head).items()}
        torch.save(named, folder / "action_head--150000_checkpoint.pt")
        proprio = filled(mlp({"fc1": (WIDTH, 8), "fc2": (WIDTH, WIDTH)}))
        named = {f"module.{name}": value for name, value in proprio.items()}
        torch.save(named, folder / "proprio_projector--150000_checkpoint.pt")
    return folder


@pytest.mark.parametrize("oft", [False, True])
def test_a_published_folder_becomes_a_policy(oft, tmp_path, monkeypatch):
    folder = write(tmp_path / "published", oft=oft)
    options = ImportOptions(embodiment="bridge")
    if oft:
        options = replace(options, horizon=8, cameras=("primary", "wrist"))
    path, framework = import_checkpoint(folder, tmp_path / "ours.ckpt", options)
    assert type(framework).__name__ == ("OpenVLAOFT" if oft else "OpenVLA")
    expected = weight_map((3, 3)).to_ours(published(), "published")
    own = framework.state_dict()
    assert all(torch.equal(own[name], value) for name, value in expected.items())
    assert own["normalizer.action_scale"].tolist() == pytest.approx([2.0] * 6 + [1.0])
    policy = Policy.from_checkpoint(path, device="cpu")
    spec = policy.spec
    assert [dim.kind for dim in spec.action][-1] == "gripper"
    observation = {
        "images": {camera.name: np.full((224, 224, 3), 90, np.uint8) for camera in spec.cameras},
        "state": np.zeros(spec.state_dim, np.float32),
        "prompt": "Pick up the cup",
    }
    actions = policy.infer(observation)["actions"]
    assert actions.shape == ((8 if oft else 1), 7)
    assert np.isfinite(actions).all()
    assert policy.framework.crop.acting == (0.9 if oft else None)
    if not oft:
        assert own["tokens.ids"][[0, 255]].tolist() == [31_999, 31_744]


def test_what_training_cropped_is_known_by_the_folder(tmp_path):
    """OpenVLA's code names its runs by it; the published fine-tuned ones were all trained with crops."""
    run = "openvla-7b+libero_spatial_no_noops+b8+lr-0.0005+lora-r32+dropout-0.0"
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "dataset_statistics.json").write_text("{}")
    for name, oft, expected in (
        ("base", False, False),
        ("base", True, True),
        ("tuned", False, True),
        (run, True, False),
        (f"{run}--image_aug", False, True),
        (f"{run}--parallel_dec--image_aug--2_img", True, True),
    ):
        assert crops(tmp_path / name, oft) is expected


def test_a_missing_and_a_surplus_tensor_are_named(tmp_path):
    folder = write(tmp_path / "published")
    weights = load_file(folder / "model.safetensors")
    gone = "projector.fc2.weight"
    save_file({n: x for n, x in weights.items() if n != gone}, folder / "model.safetensors")
    options = ImportOptions(embodiment="bridge")
    with pytest.raises(LibrobotError, match=r"multi_modal_projector\.fc2\.weight"):
        import_checkpoint(folder, tmp_path / "one.ckpt", options)
    save_file(weights | {"surplus.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(LibrobotError, match=r"surplus\.weight"):
        import_checkpoint(folder, tmp_path / "two.ckpt", options)
    with pytest.raises(LibrobotError, match="bridge, other"):
        import_checkpoint(folder, tmp_path / "three.ckpt")
    with pytest.raises(LibrobotError, match=r"no statistics of 'brigde'.*bridge"):
        import_checkpoint(folder, tmp_path / "four.ckpt", replace(options, embodiment="brigde"))


def test_what_no_file_of_oft_says_is_asked_for(tmp_path):
    folder, out = write(tmp_path / "published", oft=True), tmp_path / "ours.ckpt"
    options = ImportOptions(embodiment="bridge", cameras=("left", "right"))
    with pytest.raises(LibrobotError, match="how many actions a chunk has; name it by --horizon N"):
        import_checkpoint(folder, out, options)
    with pytest.raises(LibrobotError, match="which pictures it reads; name them in order by --cameras"):
        import_checkpoint(folder, out, replace(options, horizon=5, cameras=None))
    framework = import_checkpoint(folder, out, replace(options, horizon=5))[1]
    assert (framework.horizon, framework.spec.camera_names, framework.spec.state_dim) == (
        5,
        ("left", "right"),
        8,
    )
    said = config() | {"num_actions_chunk": 5, "num_images_in_input": 2}
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(LibrobotError, match="horizon is 5 by its own files, and 8 by --horizon"):
        import_checkpoint(folder, tmp_path / "b.ckpt", ImportOptions(embodiment="bridge", horizon=8))
    proprio = filled(mlp({"fc1": (WIDTH, 14), "fc2": (WIDTH, WIDTH)}))
    torch.save(proprio, folder / "proprio_projector--150000_checkpoint.pt")
    with pytest.raises(LibrobotError, match="weights are of 14 proprio dimensions, its statistics of 8"):
        import_checkpoint(folder, tmp_path / "c.ckpt", ImportOptions(embodiment="bridge"))


@torch.inference_mode()
def test_siglips_second_to_last_layer_is_that_of_transformers():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    ours = VisionTransformer(**SIGLIP, image_size=28).eval()
    made = SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
        image_size=28, patch_size=14, hidden_act="gelu", layer_norm_eps=1e-6, vision_use_head=False,
    )  # fmt: skip
    theirs = SiglipVisionModel(made).eval()
    copied = theirs.state_dict()
    start = next(name for name in copied if name.endswith("patch_embedding.weight")).partition("embeddings")[
        0
    ]
    given = {
        "patch_embed.proj.weight": copied[f"{start}embeddings.patch_embedding.weight"],
        "patch_embed.proj.bias": copied[f"{start}embeddings.patch_embedding.bias"],
        "pos_embed": copied[f"{start}embeddings.position_embedding.weight"][None],
    }
    renamed = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj"}
    renamed |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for i in range(2):
        for kind in ("weight", "bias"):
            layer = f"{start}encoder.layers.{i}."
            given |= {f"blocks.{i}.{b}.{kind}": copied[f"{layer}{a}.{kind}"] for a, b in renamed.items()}
            parts = [copied[f"{layer}self_attn.{n}_proj.{kind}"] for n in "qkv"]
            given[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    ours.load_state_dict(given, strict=True)
    pixels = torch.randn(2, 3, 28, 28)
    expected = theirs(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(ours(pixels), expected, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_dinov2s_second_to_last_layer_is_that_of_transformers():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    ours = VisionTransformer(**DINO, image_size=28).eval()
    made = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, image_size=28,
        patch_size=14, num_register_tokens=2, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = Dinov2WithRegistersModel(made).eval()
    copied = theirs.state_dict()
    positions = copied["embeddings.position_embeddings"]
    given = {
        "patch_embed.proj.weight": copied["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": copied["embeddings.patch_embeddings.projection.bias"],
        "pos_embed": positions[:, 1:],
        "cls_token": copied["embeddings.cls_token"] + positions[:, :1],  # timm's has its position inside
        "reg_token": copied["embeddings.register_tokens"],
    }
    renamed = {"norm1": "norm1", "norm2": "norm2", "attention.output.dense": "attn.proj"}
    renamed |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for i in range(2):
        layer = f"encoder.layer.{i}."
        for kind in ("weight", "bias"):
            given |= {f"blocks.{i}.{b}.{kind}": copied[f"{layer}{a}.{kind}"] for a, b in renamed.items()}
            parts = [copied[f"{layer}attention.attention.{n}.{kind}"] for n in ("query", "key", "value")]
            given[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
        for n in (1, 2):
            given[f"blocks.{i}.ls{n}.scale_factor"] = copied[f"{layer}layer_scale{n}.lambda1"]
    ours.load_state_dict(given, strict=True)
    pixels = torch.randn(2, 3, 28, 28)
    expected = theirs(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 3:]
    torch.testing.assert_close(ours(pixels), expected, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_film_scales_and_shifts_every_layer_by_the_prompts_mean_embedding():
    framework = tiny_models.build("openvla_oft", vlm="prismatic_tiny").eval()
    from omegaconf import OmegaConf

    from librobot.config.build import build

    vlm = build(OmegaConf.create(tiny_models.node("vlm", "prismatic_tiny", film=True)), "vlm").eval()
    told = []
    for block in vlm.vision_blocks:
        assert block.scale.in_features == vlm.hidden_size
        block.register_forward_pre_hook(lambda module, inputs: told.append(inputs[1]))
    observation = framework.prepare(tiny_models.batch().observation)
    inputs = vlm.processor(observation.prompt, observation.images)
    observation = replace(observation, inputs=inputs)
    vlm(observation)
    words = (inputs["camera"][0] == 0) & inputs["attention_mask"][0]
    ids = torch.cat((inputs["input_ids"][0][words], torch.tensor([vlm.vocabulary.space, vlm.vocabulary.end])))
    expected = vlm.embed_tokens(ids[None]).mean(dim=1)
    assert len(told) == len(vlm.vision_blocks)
    for language in told:
        torch.testing.assert_close(language[:1], expected, atol=1e-6, rtol=1e-5)
