"""Compiled layers and torch's flex_attention give the numbers of plain ones."""

import pytest
import torch
from omegaconf import OmegaConf

import tiny_models
from librobot.config.build import build

pytestmark = pytest.mark.slow  # the compiler needs a minute for each

OBSERVATION = tiny_models.batch(2).observation


def with_options(framework, name: str, **changes):
    """The same weights behind other options."""
    made = build(OmegaConf.create(tiny_models.node("vlm", name, **changes)), "vlm")
    made.load_state_dict(framework.vlm.state_dict())
    return made


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def gradients(vlm, observation) -> dict[str, torch.Tensor]:
    vlm.train().zero_grad()
    context = vlm(observation)
    context.hidden[context.mask].square().mean().backward()
    return {name: p.grad for name, p in vlm.named_parameters() if p.grad is not None}


def test_compiled_layers():
    framework = tiny_models.build("pi0", vlm="qwen2vl_tiny")
    plain, compiled = framework.vlm, with_options(framework, "qwen2vl_tiny", compile=True)
    observation = framework.prepare(OBSERVATION)
    expected, found = gradients(plain, observation), gradients(compiled, observation)
    for name in set(found) - set(expected):  # pi0 has frozen what no cache depends on
        found.pop(name)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    contexts = [vlm.eval()(observation) for vlm in (plain, compiled)]
    assert largest(*(c.hidden[c.mask] for c in contexts)) < 1e-5
    assert largest(*(torch.stack(c.keys) for c in contexts)) < 1e-5


def test_flex_attention():
    framework = tiny_models.build("pi0", vlm="paligemma_tiny")
    flexible = with_options(framework, "paligemma_tiny", attn_implementation="flex_attention")
    observation = framework.prepare(OBSERVATION)
    with torch.no_grad():
        contexts = [vlm.eval()(observation) for vlm in (framework.vlm, flexible)]
    assert largest(*(c.hidden[c.mask] for c in contexts)) < 1e-5
