"""Which noise goes with which actions: the exact optimal-transport plan of a minibatch.

OT-CFM (Tong et al. 2024, section 3.3; Pooladian et al. 2023) pairs noise and data so that paths are short
and do not cross. In a conditional problem, a plan over actions alone would tell the noise what the context
is, and sampling, which draws noise without looking at the context, would start from the wrong distribution.
So pairs also pay for the distance between the contexts of the two samples (Cheng and Schwing 2025, "The curse
of conditions"): noise changes places between alike situations only.
"""

from __future__ import annotations

import os

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@torch.no_grad()
def optimal_partners(
    noise: Float[Tensor, "b k a"],
    actions: Float[Tensor, "b k a"],
    mask: Bool[Tensor, "b k a"],
    features: Float[Tensor, "b f"],
    condition_weight: float,
) -> Int[Tensor, " b"]:
    """For each sample the index of the noise that it is paired with: a permutation.

    Minimises the sum of squared distances over the elements that `mask` admits, plus `condition_weight` times
    the squared distance of the two samples' `features`; each kind of distance is divided by its mean over
    all pairs, so that the weight has no unit.
    """
    os.environ.setdefault("POT_BACKEND_DISABLE_TENSORFLOW", "1")  # else POT loads it where it finds it
    import ot

    count = len(noise)
    cost = _relative(pair_costs(noise, actions, mask))
    cost = cost + condition_weight * _relative(torch.cdist(features.double(), features.double()).square())
    uniform = torch.full((count,), 1.0 / count, dtype=torch.float64).numpy()
    plan = ot.emd(uniform, uniform, cost.cpu().numpy(), numItermax=1_000_000)
    return torch.from_numpy(plan.argmax(axis=1)).to(noise.device)


def pair_costs(
    noise: Float[Tensor, "b k a"], actions: Float[Tensor, "b k a"], mask: Bool[Tensor, "b k a"]
) -> Float[Tensor, "b b"]:
    """Squared distance of sample i's admitted actions (row) to noise j (column), in float64."""
    seen = mask.flatten(1).double()
    target, start = actions.flatten(1).double() * seen, noise.flatten(1).double()
    return target.square().sum(1, keepdim=True) - 2 * target @ start.T + seen @ start.square().T


def _relative(cost: Float[Tensor, "b b"]) -> Float[Tensor, "b b"]:
    mean = cost.mean()
    return cost / mean if mean > 0 else cost
