"""Chunks of actions seen from where the robot is: relative to its state, or each to the one before.

    relative   y_i = a_i - s                  pi0 (openpi's DeltaActions), GR00T N1.6 and N1.7, UMI
    delta      y_0 = a_0 - s, y_i = a_i - a_{i-1}

`dims` says which state dimension each action dimension starts from; -1 leaves an action as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Dims = Sequence[int] | Int[Tensor, "*#b a"]


def relative_to_state(
    actions: Float[Tensor, "*b k a"], state: Float[Tensor, "*b s"], dims: Dims
) -> Float[Tensor, "*b k a"]:
    """Each action less the state that it starts from. `dims` is (a,), or (*b, a) where samples differ.

    Raises ValueError where `dims` names no action or no state dimension.
    """
    return actions - start(actions, state, dims)


def from_relative_to_state(
    relative: Float[Tensor, "*b k a"], state: Float[Tensor, "*b s"], dims: Dims
) -> Float[Tensor, "*b k a"]:
    """The inverse of `relative_to_state`."""
    return relative + start(relative, state, dims)


def relative_to_previous(
    actions: Float[Tensor, "*b k a"], state: Float[Tensor, "*b s"], dims: Dims
) -> Float[Tensor, "*b k a"]:
    """Each action less the one before it, the first less the state that it starts from."""
    begin = start(actions, state, dims)
    before = torch.cat((begin, actions[..., :-1, :]), dim=-2)
    return torch.where(moving(dims, actions), actions - before, actions)


def from_relative_to_previous(
    deltas: Float[Tensor, "*b k a"], state: Float[Tensor, "*b s"], dims: Dims
) -> Float[Tensor, "*b k a"]:
    """The inverse of `relative_to_previous`."""
    return torch.where(moving(dims, deltas), deltas.cumsum(dim=-2) + start(deltas, state, dims), deltas)


def start(
    actions: Float[Tensor, "*b k a"], state: Float[Tensor, "*b s"], dims: Dims
) -> Float[Tensor, "*b 1 a"]:
    """What the actions start from: the state's dimensions, 0 where an action is left as it is."""
    index = torch.as_tensor(dims, device=state.device)
    if index.shape[-1] != actions.shape[-1]:
        raise ValueError(
            f"dims must name a state dimension (or -1) for each of {actions.shape[-1]} action dimensions, "
            f"found {index.shape[-1]}"
        )
    if (
        not isinstance(dims, Tensor) and max(dims, default=-1) >= state.shape[-1]
    ):  # a tensor's look would wait
        raise ValueError(f"dims must lie below {state.shape[-1]}, the state's width, found {list(dims)}")
    if not state.shape[-1]:
        return torch.zeros_like(actions[..., :1, :])
    gathered = state.gather(-1, index.clamp_min(0).expand(*state.shape[:-1], index.shape[-1]))
    return gathered.masked_fill(index < 0, 0.0)[..., None, :].to(actions.dtype)


def moving(dims: Dims, actions: Tensor) -> Tensor:
    """Which dimensions are relative: (a,), or (*b, 1, a)."""
    index = torch.as_tensor(dims, device=actions.device) >= 0
    return index if index.ndim == 1 else index[..., None, :]
