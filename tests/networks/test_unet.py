"""The U-Net beside LeRobot's, and on horizons that it has to pad."""

from dataclasses import replace

import network_cases as cases
import pytest
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionConditionalUnet1d

from librobot.networks.unet import ConditionalUNet1D

ACTION_DIM, CONTEXT, TIME = 3, 10, 16
LEVELS = (16, 32, 64)


def theirs(film_scale: bool, kernel_size: int) -> DiffusionConditionalUnet1d:
    config = DiffusionConfig(
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION_DIM,))},
        input_features={},
        down_dims=LEVELS,
        kernel_size=kernel_size,
        n_groups=8,
        diffusion_step_embed_dim=TIME,
        use_film_scale_modulation=film_scale,
    )
    return DiffusionConditionalUnet1d(config, CONTEXT)


def ours(film_scale: bool, kernel_size: int) -> ConditionalUNet1D:
    return ConditionalUNet1D(
        ACTION_DIM,
        ACTION_DIM,
        TIME + CONTEXT,
        level_channels=LEVELS,
        kernel_size=kernel_size,
        num_groups=8,
        film_scale=film_scale,
    )


def renamed(name: str) -> str:
    """Their parameter's name in our module."""
    name = name.replace("_modules.", ".").replace("mid.", "middle.")
    parts = name.split(".")
    if parts[0] in ("down", "up"):
        parts[2] = {"0": "first", "1": "second", "2": "resample"}[parts[2]]
    name = ".".join(parts)
    for before, after in (
        ("conv1.block.", "first."),
        ("conv2.block.", "second."),
        ("cond_encoder.", "film."),
        ("residual_conv.", "shortcut."),
        ("final_conv.0.block.", "last."),
        ("final_conv.1.", "output_proj."),
    ):
        name = name.replace(before, after)
    return name


@pytest.mark.parametrize("film_scale", [True, False])
@pytest.mark.parametrize("kernel_size", [3, 5])
@torch.no_grad()
def test_the_same_weights_give_what_lerobot_gives(film_scale, kernel_size):
    torch.manual_seed(0)
    reference, made = theirs(film_scale, kernel_size), ours(film_scale, kernel_size)
    weights = {
        renamed(name): value
        for name, value in reference.state_dict().items()
        if not name.startswith("diffusion_step_encoder")
    }
    made.load_state_dict(weights, strict=True)
    x, context = torch.randn(3, 16, ACTION_DIM), torch.randn(3, CONTEXT)
    timestep = torch.tensor([0, 40, 99])
    condition = torch.cat((reference.diffusion_step_encoder(timestep), context), dim=-1)
    expected = reference(x, timestep, global_cond=context)
    assert (made(x, condition) - expected).abs().max() <= 1e-5
    assert expected.std() > 0.1


@pytest.mark.parametrize("horizon", [1, 2, 3, 5, 7, 16])
def test_any_horizon(horizon):
    sizes = replace(cases.SIZES, horizon=horizon)
    network = cases.build("unet", sizes=sizes, level_channels=[16, 16, 32]).train()
    for size in (1, 4):
        out = network(*cases.chunk(size, sizes=sizes), cases.context(size))
        assert out.shape == (size, horizon, sizes.output_width)
        assert out.isfinite().all()


@torch.no_grad()
def test_padding_repeats_the_last_step():
    torch.manual_seed(0)
    core, x, condition = ours(True, 5), torch.randn(2, 6, ACTION_DIM), torch.randn(2, TIME + CONTEXT)
    longer = torch.cat((x, x[:, -1:], x[:, -1:]), dim=1)
    torch.testing.assert_close(core(x, condition), core(longer, condition)[:, :6])


@torch.no_grad()
def test_attention_pools_only_with_attention():
    given = cases.context()
    shuffled = replace(given, values=given.values.flip(1), mask=given.mask.flip(1))
    for pool in ("mean", "attention"):
        network = cases.build("unet", pool=pool)
        assert (network.context_pool.query is not None) == (pool == "attention")
        torch.testing.assert_close(network.context_pool(given), network.context_pool(shuffled))
