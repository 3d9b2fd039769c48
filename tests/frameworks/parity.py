"""Our frameworks beside lerobot's policies: the same weights through the import table, the same inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from librobot.interchange.weights import WeightMap

TOLERANCE = {"loss": 1e-5, "gradients": 1e-4, "actions": 1e-5}
"""The largest difference over the largest value."""


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


def same_weights(ours: nn.Module, theirs: nn.Module, table: WeightMap) -> None:
    """Theirs into ours, every tensor; ours back into theirs, strictly, without a difference."""
    given = {name: value.clone() for name, value in theirs.state_dict().items()}
    made = table.to_ours(given, "lerobot's weights")
    own = ours.state_dict()
    assert set(made) == {name for name in own if not name.startswith("normalizer.")}
    ours.load_state_dict(own | made, strict=True)
    back = table.to_theirs(ours.state_dict(), "our weights")
    theirs.load_state_dict(back, strict=True)
    assert all(torch.equal(value, given[name]) for name, value in theirs.state_dict().items())


def gradient_differences(ours: nn.Module, theirs: nn.Module, table: WeightMap) -> dict[str, float]:
    """Our name -> the relative difference of the gradient's norm, and of the gradient, the larger."""
    expected = table.to_ours(gradients(theirs), "lerobot's gradients")
    found = gradients(ours)
    nothing = [name for name in expected.keys() - found.keys() if not expected[name].any()]
    expected = {name: value for name, value in expected.items() if name not in nothing}
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    largest = max(float(value.norm()) for value in expected.values())
    differences = {}
    for name, value in expected.items():
        scale = max(float(value.norm()), 1e-4 * largest)  # rounding errors come from the whole loss
        norms = abs(float(found[name].norm() - value.norm())) / scale
        differences[name] = max(norms, float((found[name] - value).norm()) / scale)
    return differences


def gradients(module: nn.Module) -> Mapping[str, Tensor]:
    return {name: value.grad for name, value in module.named_parameters() if value.grad is not None}


def check(name: str, **differences: float) -> None:
    """Print the differences (pytest -rP shows them) and hold them against the tolerances."""
    print(name, *(f"{key} {value:.1e}" for key, value in differences.items()))
    wrong = {key: value for key, value in differences.items() if not value <= TOLERANCE[key]}
    assert not wrong, wrong
