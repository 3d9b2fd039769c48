"""SmolVLA beside lerobot's: loss, every gradient, sampled actions; weights through the table."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from parity import check, gradient_differences, relative, same_weights
from transformers import SmolVLMConfig

import tiny_models
from librobot.config.build import build_framework
from librobot.interchange.lerobot.smolvla import weight_map
from librobot.types import Camera

pytest.importorskip("lerobot")

HORIZON, PADDED, LAYERS = tiny_models.HORIZON, 8, 4
SPEC = replace(
    tiny_models.SPEC, cameras=(Camera("wrist", 24, 32), Camera("front", 40, 20))
)  # both are padded


def backbone() -> dict:
    """conf/vlm/smolvla.yaml in the sizes of smolvlm2_tiny, with more layers than are kept."""
    tiny = OmegaConf.to_container(tiny_models.load("vlm", "smolvlm2_tiny"))
    tiny["config"]["text_config"]["num_hidden_layers"] = LAYERS + 1
    own = OmegaConf.to_container(OmegaConf.load(tiny_models.CONF / "vlm" / "smolvla.yaml"))
    own.pop("defaults")
    return tiny | own | {"num_layers": LAYERS}


def built(**changes):
    torch.manual_seed(0)
    plain = tiny_models.config("smolvla", expert_width_share=0.75, freeze=[], **changes)
    plain["vlm"] = backbone()
    framework = build_framework(OmegaConf.create(plain), SPEC)
    framework.normalizer.fit(tiny_models.statistics())
    return framework


@pytest.fixture
def reference(monkeypatch):
    """lerobot's policy over a backbone of the same sizes: its configuration comes from here, not the hub."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.smolvla import smolvlm_with_expert as module
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    def make(ours, **changes):
        config = SmolVLMConfig(**backbone()["config"])
        for name in ("image_token_id", "pad_token_id"):
            setattr(config, name, getattr(ours.vlm.model.config, name))
        tokenizer = SimpleNamespace(fake_image_token_id=1, global_image_token_id=2)
        for name, value in (("AutoConfig", config), ("AutoProcessor", SimpleNamespace(tokenizer=tokenizer))):
            made = SimpleNamespace(from_pretrained=lambda *_, value=value: value)
            monkeypatch.setattr(module, name, made)
        side = config.vision_config.image_size
        options = {
            "chunk_size": HORIZON,
            "n_action_steps": HORIZON,
            "max_state_dim": PADDED,
            "max_action_dim": PADDED,
            "resize_imgs_with_padding": (side, side),
            "num_vlm_layers": LAYERS,
            "num_steps": 4,
            "device": "cpu",
        }
        policy = SmolVLAPolicy(
            SmolVLAConfig(
                input_features={
                    "observation.state": PolicyFeature(FeatureType.STATE, (SPEC.state_dim,)),
                    **{
                        f"observation.images.{c.name}": PolicyFeature(
                            FeatureType.VISUAL, (3, c.height, c.width)
                        )
                        for c in SPEC.cameras
                    },
                },
                output_features={"action": PolicyFeature(FeatureType.ACTION, (SPEC.action_dim,))},
                **options | changes,
            )
        )
        return policy.requires_grad_(True)  # theirs freezes the backbone, ours is compared whole

    return make


def observed(monkeypatch, *, absent: bool):
    monkeypatch.setattr(tiny_models, "SPEC", SPEC)
    data = tiny_models.batch()
    if absent:
        data.observation.image_mask["front"][1] = False
    return data


def given(ours, data):
    """A batch as lerobot's preprocessor makes it."""
    observation = data.observation
    tokenizer = ours.vlm.tokenizer
    ids = [tokenizer(f"{prompt}\n")["input_ids"] for prompt in observation.prompt]
    length = max(map(len, ids))
    tokens = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in ids])
    sizes = torch.tensor([len(row) for row in ids])
    return {
        **{f"observation.images.{name}": image[:, 0] / 255 for name, image in observation.images.items()},
        **{f"observation.images.{name}_padding_mask": mask for name, mask in observation.image_mask.items()},
        "observation.state": ours.normalizer.normalize("state", observation.state[:, 0]),
        "observation.language.tokens": tokens,
        "observation.language.attention_mask": torch.arange(length) < sizes[:, None],
        "action": ours.normalizer.normalize("action", data.actions),
        "action_is_pad": ~data.action_mask,
    }


CASES = {
    "published": ({}, {}),
    "all_cross": ({"self_attn_every_n_layers": -1}, {"self_attention_every": 0}),
    "all_self": ({"attention_mode": "self_attn"}, {"self_attention_every": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_same_weights_same_answers(case, reference, monkeypatch):
    theirs_options, ours_options = CASES[case]
    ours = built(**ours_options)
    theirs = reference(ours, **theirs_options)
    table = weight_map()
    same_weights(ours, theirs, table)
    data = observed(monkeypatch, absent=True)
    data.actions[-1, -2:] = data.actions[-1, -3]  # what our heads see past the end
    inputs = given(ours, data)
    noise = torch.randn(4, HORIZON, PADDED, generator=torch.Generator().manual_seed(3))
    time = torch.tensor([0.05, 0.4, 0.7, 0.999])

    expected, _ = theirs(dict(inputs), noise=noise, time=time)
    loss, _ = ours.compute_loss(data, noise=noise, time=time)
    expected.backward()
    loss.backward()
    unused = ours.vlm.unused_parameters(())
    for parameter in unused:
        assert parameter.grad is None
    gradients = gradient_differences(ours, theirs, table)
    assert len(gradients) == len(list(ours.parameters())) - len(unused)

    with torch.no_grad():
        actions = theirs.predict_action_chunk(dict(inputs), noise=noise)
        actions = ours.normalizer.unnormalize("action", actions)
        sampled = ours.eval().sample_actions(data.observation, noise=noise, num_steps=4)
    check(
        f"smolvla {case}",
        loss=relative(loss, expected),
        gradients=max(gradients.values()),
        actions=relative(sampled, actions),
    )
