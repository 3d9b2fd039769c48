"""Every network of the configuration, shrunk, and a context to run it on."""

from __future__ import annotations

from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import tiny_models
from librobot.networks.base import ContextTokens, Sizes

SIZES = Sizes(
    horizon=6,
    action_dim=3,
    context_width=12,
    output_width=10,
    takes_noise=True,
    vocabulary=11,
    max_tokens=7,
)
OPTIONS = tiny_models.options("network")


def kind_of(option: str) -> str:
    return {"causal": "decoder", "pair": "pair"}.get(option, "denoiser")


DENOISERS = [name for name in OPTIONS if kind_of(name) == "denoiser"]


def build(option: str, *, sizes: Sizes = SIZES, seed: int = 0, **changes) -> Any:
    """In eval mode, with what starts at zero drawn at random, so that every path has an effect."""
    torch.manual_seed(seed)
    node = OmegaConf.create(tiny_models.node("network", option, **changes))
    return opened(instantiate(node, _convert_="all")(sizes=sizes)).eval()


def opened(network: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return network


def context(
    size: int = 4, length: int = 5, *, width: int = SIZES.context_width, seed: int = 1
) -> ContextTokens:
    """Samples with different numbers of real tokens."""
    draw = torch.Generator().manual_seed(seed)
    real = 1 + torch.arange(size) % length
    return ContextTokens(
        values=torch.randn(size, length, width, generator=draw),
        mask=torch.arange(length)[None] < real[:, None],
        features=torch.randn(size, 2, generator=draw),
        null=torch.zeros(width),
    )


def rows(given: ContextTokens, which: slice) -> ContextTokens:
    return ContextTokens(given.values[which], given.mask[which], given.features[which], given.null)


def chunk(size: int = 4, *, sizes: Sizes = SIZES, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x_t = torch.randn(size, sizes.horizon, sizes.action_dim, generator=draw)
    return x_t, torch.linspace(0.1, 0.9, size)
