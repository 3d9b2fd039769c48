"""lerobot's pi0 and pi0.5 at sizes that a test can afford, and the same inputs for both sides."""

from __future__ import annotations

import importlib
import types

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies import pi_gemma

import tiny_models
from librobot.vlms.loading import byte_tokenizer

VOCABULARY, WIDTH, EXPERT_WIDTH, LAYERS, HEAD_DIM, SIDE = 320, 64, 32, 3, 16, 28


def shrunk(config):
    """The sizes that lerobot's constructor fixes."""
    if hasattr(config, "vision_config"):
        vision, text = config.vision_config, config.text_config
        vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads = 144, 2, 2
        vision.intermediate_size, vision.projection_dim = 96, WIDTH
    else:
        text = config
    text.vocab_size = VOCABULARY
    return config


def variant(name: str) -> types.SimpleNamespace:
    width = {"gemma_2b": WIDTH, "gemma_300m": EXPERT_WIDTH}[name]
    return types.SimpleNamespace(
        width=width, depth=LAYERS, mlp_dim=3 * width, num_heads=8, num_kv_heads=1, head_dim=HEAD_DIM
    )


def reference(kind: str, monkeypatch, **options):
    """A policy of lerobot ("pi0", "pi05") with random weights everywhere, in training mode."""
    module = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    config_module = importlib.import_module(f"lerobot.policies.{kind}.configuration_{kind}")
    for name in ("PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM"):
        original = getattr(pi_gemma, name)
        monkeypatch.setattr(module, name, lambda config, original=original: original(shrunk(config)))
    monkeypatch.setattr(module, "get_gemma_config", variant)
    spec = tiny_models.SPEC
    config = getattr(config_module, f"{kind.upper()}Config")(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (spec.state_dim,)),
            **{
                f"observation.images.{camera.name}": PolicyFeature(
                    FeatureType.VISUAL, (3, camera.height, camera.width)
                )
                for camera in spec.cameras
            },
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (spec.action_dim,))},
        chunk_size=tiny_models.HORIZON,
        n_action_steps=tiny_models.HORIZON,
        max_state_dim=8,
        max_action_dim=8,
        image_resolution=(SIDE, SIDE),
        device="cpu",
        **options,
    )
    torch.manual_seed(1)
    policy = getattr(module, f"{kind.upper()}Policy")(config)
    with torch.no_grad():
        for parameter in policy.parameters():  # norms and gates that start at zero would hide differences
            parameter.add_(0.05 * torch.randn_like(parameter))
    return policy.train()


def save(policy, folder, statistics) -> None:
    """The policy's folder as lerobot's trainer writes it, but for the tokenizer, which it would download."""
    from lerobot.processor import NormalizerProcessorStep, PolicyProcessorPipeline

    config = policy.config
    features = {**config.input_features, **config.output_features}
    named = {"observation.state": statistics["state"], "action": statistics["action"]}
    step = NormalizerProcessorStep(features=features, norm_map=config.normalization_mapping, stats=named)
    policy.save_pretrained(folder)
    PolicyProcessorPipeline(steps=[step], name="policy_preprocessor").save_pretrained(folder)


def tokenizer(folder) -> str:
    """A folder with a byte tokenizer that knows PaliGemma's special tokens."""
    byte_tokenizer(["<pad>", "<eos>", "<bos>", "<image>"], pad="<pad>", eos="<eos>").save_pretrained(folder)
    return str(folder)


def inputs(policy, ours, data, prompts, length) -> dict[str, torch.Tensor]:
    """lerobot's batch for our `data`; `prompts` are the texts that are to be read."""
    words = ours.vlm.tokenizer
    rows = [words(f"<bos>{text}", add_special_tokens=False)["input_ids"] for text in prompts]
    tokens = torch.tensor([row + [words.pad_token_id] * (length - len(row)) for row in rows])
    mask = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
    images = data.observation.images
    return {
        **{f"observation.images.{name}": image[:, 0] / 255 for name, image in images.items()},
        "observation.state": ours.normalized_state(data.observation)[:, -1],
        "observation.language.tokens": tokens,
        "observation.language.attention_mask": mask,
        "action": ours.normalized_actions(data),
    }


def losses(policy, ours, batch, data, noise, time, monkeypatch):
    """Both sides' losses; gradients are then in the parameters."""
    monkeypatch.setattr(policy.model, "sample_noise", lambda shape, device: noise)
    monkeypatch.setattr(policy.model, "sample_time", lambda count, device: time)
    expected, _ = policy(batch)
    expected.backward()
    loss, _ = ours.compute_loss(data, noise=noise, time=time)
    loss.backward()
    return loss.item(), expected.item()
