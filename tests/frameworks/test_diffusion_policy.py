"""Diffusion Policy's facts: its window, its pictures, its transformer, its published size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tiny_models
from librobot.config.build import build_framework
from librobot.config.compose import compose
from librobot.errors import LibrobotError
from librobot.nn.diffusion_transformer import DiffusionTransformer, causal, sees_memory
from librobot.nn.keypoint_encoder import KeypointEncoder, SpatialSoftmax, position_grid, windows
from librobot.nn.positions import level_embedding
from librobot.nn.resnet import ResNet18
from librobot.types import Camera, Dim, RobotSpec


def test_the_chunk_begins_at_the_first_observation_step():
    framework = tiny_models.build("diffusion_policy", horizon=8, obs_steps=3)
    assert framework.action_offset == -2
    assert framework.num_future_actions == 6
    observation = tiny_models.batch(obs_steps=3).observation
    noise = torch.zeros(4, 8, tiny_models.SPEC.action_dim)
    given = {}
    framework.head.sample = lambda *_, **__: given.setdefault("all", torch.arange(96.0).reshape(4, 8, 3))
    framework.normalizer.action_offset.zero_()
    framework.normalizer.action_scale.fill_(1.0)
    assert torch.equal(framework.sample_actions(observation, noise=noise), given["all"][:, 2:])


def test_a_chunk_must_reach_the_current_step():
    with pytest.raises(LibrobotError, match="horizon must be at least obs_steps=4"):
        tiny_models.build("diffusion_policy", horizon=3, obs_steps=4)


def test_spatial_softmax_finds_the_place_of_a_peak():
    """x first, then y; the corners of the map are at -1 and 1."""
    assert position_grid(2, 3).tolist() == [[-1, -1], [0, -1], [1, -1], [-1, 1], [0, 1], [1, 1]]
    pool = SpatialSoftmax(1, 1)
    with torch.no_grad():
        pool.proj.weight.fill_(100.0)
        features = torch.zeros(1, 1, 2, 3)
        features[0, 0, 1, 0] = 1.0
        torch.testing.assert_close(pool(features), torch.tensor([[[-1.0, 1.0]]]))


def test_the_crop_is_random_in_training_and_the_centre_otherwise():
    encoder = KeypointEncoder(ResNet18(norm="group"), num_keypoints=4, crop=[3, 2])
    pixels = torch.arange(2 * 3 * 6 * 5.0).reshape(2, 3, 6, 5)
    assert torch.equal(
        encoder.eval().cropped(pixels), pixels[..., 2:5, 2:4]
    )  # round(1.5) is 2, as in torchvision
    torch.manual_seed(0)
    places = {tuple(encoder.train().cropped(pixels)[:, 0, 0, 0].tolist()) for _ in range(40)}
    assert len(places) > 10
    assert any(first + 90 != second for first, second in places), "each picture has a place of its own"
    cut = windows(pixels, torch.tensor([[1], [3]]), torch.tensor([[0], [3]]), 3, 2)
    assert torch.equal(cut[0], pixels[0, :, 1:4, 0:2])
    assert torch.equal(cut[1], pixels[1, :, 3:6, 3:5])


def test_pictures_too_small_for_a_place_are_refused():
    with pytest.raises(LibrobotError, match=r"camera 'wrist': .* found \(21, 28\); set framework\.resize"):
        tiny_models.build("diffusion_policy", resize=None)


def test_group_norm_has_groups_of_16_channels():
    norms = [m for m in ResNet18(norm="group").modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) == 20
    assert {norm.num_channels // norm.num_groups for norm in norms} == {16}
    with pytest.raises(ValueError, match="pretrained weights were made with batch norms"):
        ResNet18(True, norm="group")


def test_statistics_of_each_camera():
    torch.manual_seed(0)
    both = ResNet18(norm="group", mean=[[0.0] * 3, [0.5] * 3], std=[[1.0] * 3, [0.25] * 3]).eval()
    pixels = torch.rand(1, 3, 40, 40) * 255
    moved = (pixels / 255 - 0.5) / 0.25 * 255
    torch.testing.assert_close(both(pixels, 1), both(moved, 0), rtol=1e-4, atol=1e-4)


def test_level_embedding_by_hand():
    """Frequencies 1, 1e-2, 1e-4 for six numbers; sines, then cosines."""
    angles = torch.tensor([3.0, 3e-2, 3e-4])
    expected = torch.cat((angles.sin(), angles.cos()))
    torch.testing.assert_close(level_embedding(torch.tensor([3.0]), 6)[0], expected)


def test_transformer_masks_cell_by_cell():
    """Rows are actions; the memory is the level, then two observation steps."""
    assert causal(3).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert sees_memory(4, 3).int().tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]]
    network = DiffusionTransformer(
        horizon=4,
        channels_in=2,
        channels_out=2,
        condition_width=3,
        num_conditions=2,
        width=8,
        num_layers=2,
        num_heads=2,
        dropout=0.0,
    ).eval()
    x, level, conditions = torch.randn(1, 4, 2), torch.tensor([5.0]), torch.randn(1, 2, 3)
    before = network(x, level, conditions)
    later = network(x + torch.tensor([0, 0, 0, 1.0])[None, :, None], level, conditions)
    assert torch.equal(later[:, :3], before[:, :3])
    assert not torch.allclose(later[:, 3], before[:, 3])
    second = network(x, level, conditions + torch.tensor([0, 1.0])[None, :, None])
    assert torch.equal(second[:, :1], before[:, :1])
    assert not torch.allclose(second[:, 1:], before[:, 1:])


@pytest.mark.parametrize("denoiser", ["unet", "transformer"])
@pytest.mark.parametrize("backbone", ["resnet18", "vlm"])
@pytest.mark.parametrize("head", ["ddpm", "l1"])
def test_every_denoiser_over_every_observation(denoiser, backbone, head):
    framework = tiny_models.build(
        "diffusion_policy", head, denoiser=denoiser, backbone=backbone, obs_steps=2, horizon=6
    )
    data = tiny_models.batch(obs_steps=2)
    tiny_models.fixed_loss(framework, data).backward()
    missing = [n for n, p in framework.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert framework.eval().sample_actions(data.observation).shape == (4, 5, 3)


def test_copies_outside_the_episode_count_as_published():
    data = tiny_models.batch()
    changed = data.actions.clone()
    changed[~data.action_mask] += 1.0
    for mask_padding, matters in ((True, False), (False, True)):
        framework = tiny_models.build("diffusion_policy", mask_padding=mask_padding).eval()
        one, other = (
            tiny_models.fixed_loss(framework, replace(data, actions=actions))
            for actions in (data.actions, changed)
        )
        assert (one != other) == matters


@pytest.mark.slow
def test_parameters_of_the_published_size():
    """lerobot/diffusion_pusht, 263M: one camera of 96 x 96, two state and two action dimensions."""
    dims = tuple(Dim(name) for name in "xy")
    spec = RobotSpec("pusht", (Camera("image", 96, 96),), dims, dims, 10.0)
    with torch.device("meta"):  # flow matching: the same network, and a head without tables
        made = build_framework(
            compose(["framework=diffusion_policy", "head=flow_matching", "framework.crop=[84,84]"]), spec
        )
    assert sum(p.numel() for p in made.parameters()) == 262_709_026
