"""ACT beyond what every framework must hold."""

import pytest
import torch

import tiny_models
from librobot.errors import LibrobotError


def test_test_time_latent_is_zero_and_the_posterior_is_not():
    framework = tiny_models.build("act").eval()
    data = tiny_models.batch()
    seen = []
    framework.latent_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    framework.sample_actions(data.observation)
    framework.compute_loss(data)
    assert (seen[0] == 0).all()
    assert (seen[1] != 0).all()


def test_without_the_vae_there_is_no_kl():
    framework = tiny_models.build("act", use_vae=False)
    loss, metrics = framework.compute_loss(tiny_models.batch())
    assert metrics["kl"] == 0
    assert loss == metrics["action_loss"]
    assert not [name for name, _ in framework.named_parameters() if name.startswith("vae")]


def test_the_kl_weight_counts():
    data, noise = tiny_models.batch(), torch.zeros(4, 4)
    losses = [
        tiny_models.build("act", kl_weight=weight).eval().compute_loss(data, latent_noise=noise)
        for weight in (0.0, 2.0)
    ]
    (without, metrics), (with_two, _) = losses
    torch.testing.assert_close(with_two - without, 2 * metrics["kl"])


def test_resnet_reads_no_language_unless_asked():
    plain = tiny_models.build("act", backbone="resnet18").eval()
    assert plain.processor is None
    asked = tiny_models.build("act", backbone="resnet18", instruction_token=True).eval()
    observation = tiny_models.batch().observation
    with torch.inference_mode():
        for framework, differs in ((plain, False), (asked, True)):
            before = framework.sample_actions(observation)
            observation.prompt, kept = ["another task entirely"] * 4, observation.prompt
            after = framework.sample_actions(observation)
            observation.prompt = kept
            assert torch.equal(before, after) != differs


def test_an_absent_camera_of_the_resnet_is_not_looked_at():
    framework = tiny_models.build("act", backbone="resnet18").eval()
    observation = tiny_models.batch().observation
    observation.image_mask["front"] = torch.zeros(4, dtype=torch.bool)
    with torch.inference_mode():
        before = framework.sample_actions(observation)
        observation.images["front"] = 255 - observation.images["front"]
        assert torch.equal(framework.sample_actions(observation), before)


def test_weights_of_the_resnet_come_from_a_file(tmp_path):
    import torchvision

    torch.manual_seed(1)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet.pt")
    framework = tiny_models.build("act", backbone="resnet18", pretrained=str(tmp_path / "resnet.pt"))
    saved = torch.load(tmp_path / "resnet.pt", weights_only=True)
    assert torch.equal(framework.resnet.network.conv1.weight, saved["conv1.weight"])
    with pytest.raises(LibrobotError, match="ResNet-18"):
        tiny_models.build("act", backbone="resnet18", pretrained=str(tmp_path / "absent.pt"))


@pytest.mark.parametrize(
    "bad",
    [
        {"backbone": "vit"},
        {"decoder_layers_used": "last"},
        {"loss_reduction": "sum"},
        {"activation": "tanh"},
        {"horizon": 0},
        {"pretrained": True},
        {"num_heads": 5},
    ],
    ids=str,
)
def test_bad_arguments(bad):
    with pytest.raises(LibrobotError, match=next(iter(bad))):
        tiny_models.build("act", **bad)
