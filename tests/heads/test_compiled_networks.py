"""Compiled networks give every kind of head the same losses, gradients and actions."""

import os
import shutil

import known_problems
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import tiny_models

COMPILERS = [os.environ.get("CXX", "g++"), "g++", "clang++"]
pytestmark = [
    pytest.mark.slow,  # the compiler needs a minute for each network
    pytest.mark.skipif(
        not any(shutil.which(name) for name in COMPILERS),
        reason="torch.compile needs a C++ compiler on the PATH, found none: apt-get install g++",
    ),
]

PAIRS = [("flow_matching", "dit"), ("edm", "unet"), ("bins", "causal")]


@pytest.mark.parametrize(("name", "network"), PAIRS)
def test_the_same_numbers(name, network):
    torch.manual_seed(0)
    head = instantiate(OmegaConf.create(tiny_models.node("head", name)), _convert_="all")
    head.attach(horizon=known_problems.HORIZON, action_dim=known_problems.ACTION_DIM)
    node = OmegaConf.create(tiny_models.node("network", network))
    plain = instantiate(node, _convert_="all")(sizes=known_problems.sizes_for(head))
    compiled = torch.compile(plain)
    which = torch.arange(8) % known_problems.NUM_CONTEXTS
    context = known_problems.context_of(which)
    actions = known_problems.draw(which, torch.Generator().manual_seed(0))
    mask, noise = torch.ones(actions.shape[:2], dtype=torch.bool), torch.randn_like(actions)
    found = []
    for either in (plain, compiled):
        plain.zero_grad()
        loss = head.loss(either, context, actions, mask, noise=noise, time=torch.linspace(0.2, 0.9, 8))
        loss.sum().backward()
        found.append([loss.detach(), *(p.grad.clone() for p in plain.parameters() if p.grad is not None)])
        if head.network == "denoiser":
            with torch.no_grad():
                found[-1].append(head.sample(either, context, tuple(actions.shape), noise=noise))
    assert len(found[0]) == len(found[1])
    for expected, given in zip(*found, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
