"""ACT's numbers beside lerobot's, with the same weights and the same inputs."""

import pytest
import torch

import tiny_models

pytest.importorskip("lerobot")

NAMES = {  # lerobot's part -> ours
    "encoder_latent_input_proj": "latent_proj",
    "encoder_robot_state_input_proj": "state_proj",
    "encoder_img_feat_input_proj": "observation_proj",
    "encoder_1d_feature_pos_embed": "plain_positions",
    "decoder_pos_embed": "queries",
    "action_head": "action_out_proj",
    "vae_encoder_cls_embed": "vae_cls",
    "vae_encoder_robot_state_input_proj": "vae_state_proj",
    "vae_encoder_action_input_proj": "vae_action_proj",
    "vae_encoder_latent_output_proj": "vae_out_proj",
    "backbone": "resnet.network",
}
LAYERS = {
    "encoder": {
        "self_attn": "attention",
        "linear1": "feed_forward.0",
        "linear2": "feed_forward.3",
        "norm1": "around_attention.norm",
        "norm2": "around_feed_forward.norm",
    },
    "decoder": {
        "self_attn": "self_attention",
        "multihead_attn": "cross_attention",
        "linear1": "feed_forward.0",
        "linear2": "feed_forward.3",
        "norm1": "around_self_attention.norm",
        "norm2": "around_cross_attention.norm",
        "norm3": "around_feed_forward.norm",
    },
}


def renamed(name: str) -> str:
    part, _, rest = name.partition(".")
    if part in NAMES:
        return f"{NAMES[part]}.{rest}"
    if rest.startswith("layers."):
        _, index, module, tail = rest.split(".", 3)
        kind = "decoder" if part == "decoder" else "encoder"
        return f"{part}.layers.{index}.{LAYERS[kind][module]}.{tail}"
    return name


def reference(num_decoder_layers: int):
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACT

    spec = tiny_models.SPEC
    config = ACTConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (spec.state_dim,)),
            **{f"observation.images.{n}": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for n in "ab"},
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (spec.action_dim,))},
        chunk_size=tiny_models.HORIZON,
        n_action_steps=tiny_models.HORIZON,
        dim_model=32,
        n_heads=2,
        dim_feedforward=48,
        n_encoder_layers=2,
        n_decoder_layers=num_decoder_layers,
        n_vae_encoder_layers=2,
        latent_dim=4,
        dropout=0.0,
        pretrained_backbone_weights=None,
        device="cpu",
    )
    return ACT(config)


@pytest.mark.parametrize("used", ["all", "first"])
def test_same_weights_same_answers(used):
    ours = tiny_models.build("act", backbone="resnet18", dropout=0.0, decoder_layers_used=used)
    theirs = reference(num_decoder_layers=2 if used == "all" else 1)
    copied = {renamed(name): value for name, value in theirs.state_dict().items()}
    copied["observation_proj.weight"] = copied["observation_proj.weight"].squeeze((2, 3))
    copied.pop("vae_encoder_pos_enc")
    own = ours.state_dict()
    assert {n for n in own if not n.startswith("normalizer.")} == set(copied)
    ours.load_state_dict(own | copied)

    data = tiny_models.batch()
    observation = ours.prepare(data.observation)
    for module in (ours, theirs):
        module.train()  # lerobot's style encoder runs in training only; there is no dropout
    mean, std = ours.resnet.mean, ours.resnet.std
    given = {
        "observation.images": [(image[:, 0] / 255 - mean) / std for image in observation.images.values()],
        "observation.state": ours.normalizer.normalize("state", observation.state[:, 0]),
        "action": ours.normalizer.normalize("action", data.actions),
        "action_is_pad": ~data.action_mask,
    }
    torch.manual_seed(7)
    expected, (mu, log_sigma_x2) = theirs(given)
    torch.manual_seed(7)
    latent_noise = torch.randn(4, 4)
    loss, metrics = ours.compute_loss(data, latent_noise=latent_noise)

    error = (expected - given["action"]).abs() * data.action_mask[..., None]
    masked = error.sum() / (data.action_mask.sum() * expected.shape[-1])
    kl = (-0.5 * (1 + log_sigma_x2 - mu**2 - log_sigma_x2.exp())).sum(-1).mean()
    torch.testing.assert_close(metrics["action_loss"], masked.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["kl"], kl.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, masked + 10 * kl, rtol=1e-5, atol=1e-5)
    ours.loss_reduction = "original"
    _, metrics = ours.compute_loss(data, latent_noise=latent_noise)
    torch.testing.assert_close(metrics["action_loss"], error.mean().detach(), rtol=1e-5, atol=1e-6)

    ours.eval(), theirs.eval()
    with torch.no_grad():
        expected = ours.normalizer.unnormalize("action", theirs(given)[0])
        torch.testing.assert_close(ours.sample_actions(data.observation), expected, rtol=1e-5, atol=1e-5)
