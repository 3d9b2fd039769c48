"""Diffusion Policy beside lerobot's: loss, every gradient, sampled actions; weights through the table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from parity import check, gradient_differences, relative, same_weights

import tiny_models
from librobot.interchange.lerobot.diffusion import weight_map
from librobot.types import Camera

pytest.importorskip("lerobot")

SPEC = replace(tiny_models.SPEC, cameras=(Camera("wrist", 64, 72), Camera("front", 64, 72)))
HORIZON, OBS_STEPS, LEVELS = 8, 2, 20
CROP = (55, 64)  # an odd rest: where the centre is


@pytest.fixture(autouse=True)
def equal_cameras(monkeypatch):
    """lerobot wants pictures of one size."""
    monkeypatch.setattr(tiny_models, "SPEC", SPEC)


def reference(**changes):
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    torch.manual_seed(1)
    options = {
        "n_obs_steps": OBS_STEPS,
        "horizon": HORIZON,
        "n_action_steps": HORIZON - OBS_STEPS + 1,
        "down_dims": (16, 32),
        "n_groups": 4,
        "diffusion_step_embed_dim": 16,
        "crop_shape": CROP,
        "crop_is_random": False,
        "pretrained_backbone_weights": None,
        "use_group_norm": True,
        "use_separate_rgb_encoder_per_camera": False,
        "spatial_softmax_num_keypoints": 8,
        "num_train_timesteps": LEVELS,
        "do_mask_loss_for_padding": True,
        "device": "cpu",
    }
    config = DiffusionConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (SPEC.state_dim,)),
            **{
                f"observation.images.{c.name}": PolicyFeature(FeatureType.VISUAL, (3, c.height, c.width))
                for c in SPEC.cameras
            },
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (SPEC.action_dim,))},
        **options | changes,
    )
    return DiffusionPolicy(config)


def built(head: str = "ddpm_100", **changes):
    options = {"horizon": HORIZON, "obs_steps": OBS_STEPS, "crop": list(CROP), "level_width": 16}
    options["resize"] = None
    ours = tiny_models.build("diffusion_policy", head, **options | changes)
    for encoder in ours.encoders:
        encoder.train(False)  # crops at the centre, as the reference does
    return ours


def batch():
    """With copies outside the episode: before the first sample's start, behind the last one's end."""
    data = tiny_models.batch(obs_steps=OBS_STEPS, horizon=HORIZON)
    actions, mask = data.actions.clone(), data.action_mask.clone()
    mask[0, 0] = False
    actions[0, 0] = actions[0, 1]
    actions[-1, -2:] = actions[-1, -3]
    return replace(data, actions=actions, action_mask=mask)


def given(ours, data):
    """A batch as lerobot's preprocessor makes it."""
    resnet = ours.encoders[0].resnet
    images = {
        f"observation.images.{name}": (image / 255 - resnet.mean) / resnet.std
        for name, image in data.observation.images.items()
    }
    return images | {
        "observation.state": ours.normalizer.normalize("state", data.observation.state),
        "action": ours.normalizer.normalize("action", data.actions),
        "action_is_pad": ~data.action_mask,
    }


CASES = {
    "published": ({}, {}),
    "padding_counts": ({"do_mask_loss_for_padding": False}, {"mask_padding": False}),
    "encoder_per_camera": (
        {"use_separate_rgb_encoder_per_camera": True, "use_film_scale_modulation": False},
        {"encoder_per_camera": True, "film_scale": False},
    ),
    "resized": (
        {"resize_shape": (48, 56), "crop_ratio": 0.75},
        {"resize": [48, 56], "crop": [36, 42]},
    ),
    "batch_norm": ({"use_group_norm": False}, {"resnet_norm": "batch"}),
}


@pytest.mark.parametrize("case", CASES)
def test_same_weights_same_answers(case):
    theirs_options, ours_options = CASES[case]
    theirs, ours = reference(**theirs_options), built(**ours_options)
    table = weight_map(
        num_encoders=len(ours.encoders) if len(ours.encoders) > 1 else None,
        picture=tuple(theirs.config.crop_shape),
    )
    same_weights(ours, theirs, table)
    data = batch()
    inputs = given(ours, data)

    theirs.eval(), ours.eval()
    torch.manual_seed(7)
    expected, _ = theirs(dict(inputs))
    torch.manual_seed(7)
    noise = torch.randn(4, HORIZON, SPEC.action_dim)
    level = torch.randint(0, LEVELS, (4,))
    loss, _ = ours.compute_loss(data, noise=noise, time=(level + 1) / LEVELS)
    expected.backward()
    loss.backward()
    gradients = gradient_differences(ours, theirs, table)

    with torch.no_grad():
        torch.manual_seed(11)
        actions = ours.normalizer.unnormalize("action", theirs.predict_action_chunk(dict(inputs)))
        torch.manual_seed(11)
        noises = torch.stack([torch.randn(4, HORIZON, SPEC.action_dim) for _ in range(LEVELS)])
        sampled = ours.sample_actions(data.observation, noise=noises, num_steps=LEVELS)
    assert sampled.shape == (4, HORIZON - OBS_STEPS + 1, SPEC.action_dim)

    check(
        f"diffusion {case}",
        loss=relative(loss, expected),
        gradients=max(gradients.values()),
        actions=relative(sampled, actions),
    )
