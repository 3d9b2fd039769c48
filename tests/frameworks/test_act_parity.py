"""ACT beside lerobot's: loss, every gradient, actions; weights through the table."""

from __future__ import annotations

import pytest
import torch
from parity import check, gradient_differences, relative, same_weights

import tiny_models
from librobot.config.build import build_framework
from librobot.config.compose import compose
from librobot.interchange.lerobot.act import weight_map
from librobot.types import Camera, Dim, RobotSpec

pytest.importorskip("lerobot")

HORIZON, WIDTH, LATENT = tiny_models.HORIZON, 32, 4


def reference(**changes):
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    spec = tiny_models.SPEC
    options = {
        "chunk_size": HORIZON,
        "n_action_steps": HORIZON,
        "dim_model": WIDTH,
        "n_heads": 2,
        "dim_feedforward": 48,
        "n_encoder_layers": 2,
        "n_decoder_layers": 2,
        "n_vae_encoder_layers": 2,
        "latent_dim": LATENT,
        "dropout": 0.0,
        "pretrained_backbone_weights": None,
        "device": "cpu",
    }
    torch.manual_seed(1)
    config = ACTConfig(
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
        **options | changes,
    )
    return ACTPolicy(config)


def given(ours, data):
    """A batch as lerobot's preprocessor makes it."""
    mean, std = ours.resnet.mean, ours.resnet.std
    images = data.observation.images.items()
    return {f"observation.images.{name}": (image[:, 0] / 255 - mean) / std for name, image in images} | {
        "observation.state": ours.normalizer.normalize("state", data.observation.state[:, 0]),
        "action": ours.normalizer.normalize("action", data.actions),
        "action_is_pad": ~data.action_mask,
    }


CASES = {
    "all_decoder_layers": ({}, {}),
    "first_decoder_layer": ({"n_decoder_layers": 1}, {"decoder_layers_used": "first"}),
    "pre_norm_without_vae": ({"pre_norm": True, "use_vae": False}, {"pre_norm": True, "use_vae": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_same_weights_same_answers(case):
    theirs_options, ours_options = CASES[case]
    ours = tiny_models.build("act", backbone="resnet18", dropout=0.0, **ours_options)
    theirs = reference(**theirs_options)
    length = 2 + HORIZON if ours.vae_encoder is not None else 0
    table = weight_map(vae_length=length, width=WIDTH)
    same_weights(ours, theirs, table)
    data = tiny_models.batch()
    inputs = given(ours, data)

    ours.train(), theirs.train()  # lerobot's style encoder runs in training only; there is no dropout
    torch.manual_seed(7)
    expected, parts = theirs(dict(inputs))
    torch.manual_seed(7)
    latent_noise = torch.randn(4, LATENT)
    loss, metrics = ours.compute_loss(data, latent_noise=latent_noise)
    expected.backward()
    loss.backward()
    gradients = gradient_differences(ours, theirs, table)
    assert metrics["action_loss"] == pytest.approx(parts["l1_loss"], rel=1e-5)
    assert metrics["kl"] == pytest.approx(parts.get("kld_loss", 0.0), rel=1e-5)

    with torch.no_grad():
        actions = ours.normalizer.unnormalize("action", theirs.predict_action_chunk(dict(inputs)))
        sampled = ours.eval().sample_actions(data.observation)
    check(
        f"act {case}",
        loss=relative(loss, expected),
        gradients=max(gradients.values()),
        actions=relative(sampled, actions),
    )


def test_the_published_reduction_divides_by_padding_too():
    """`imitate_episodes.py`: the error past the episode's end is zero, and counts in the mean."""
    ours = tiny_models.build("act", backbone="resnet18", dropout=0.0, loss_reduction="original")
    theirs = reference()
    ours.load_state_dict(
        ours.state_dict() | weight_map(vae_length=2 + HORIZON, width=WIDTH).to_ours(theirs.state_dict(), "")
    )
    data = tiny_models.batch()
    inputs = given(ours, data)
    theirs.train()
    torch.manual_seed(7)
    predicted, _ = theirs.model(
        inputs | {"observation.images": [inputs[key] for key in theirs.config.image_features]}
    )
    torch.manual_seed(7)
    _, metrics = ours.compute_loss(data, latent_noise=torch.randn(4, LATENT))
    error = (predicted - inputs["action"]).abs() * data.action_mask[..., None]
    torch.testing.assert_close(metrics["action_loss"], error.mean().detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("decoder_layers", "published"), [(7, 83.92e6), (1, 51.61e6)])
def test_parameters_of_the_published_sizes(decoder_layers, published):
    """The original's log says 83.92M (seven decoder layers, four cameras); lerobot's ACT has 52M (one)."""
    dims = tuple(Dim(str(i)) for i in range(14))
    spec = RobotSpec("aloha", tuple(Camera(f"camera{i}", 480, 640) for i in range(4)), dims, dims, 50.0)
    overrides = ["framework=act", "framework.backbone=resnet18"]
    with torch.device("meta"):
        made = build_framework(compose([*overrides, f"framework.num_decoder_layers={decoder_layers}"]), spec)
    assert sum(p.numel() for p in made.parameters()) == pytest.approx(published, rel=1e-3)
