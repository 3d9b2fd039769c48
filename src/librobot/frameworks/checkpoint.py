"""Plain values for checkpoints, and weights that either fit or say which tensors do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from librobot.errors import LibrobotError
from librobot.nn.stored import StoredTensor

SHOWN = 8  # names per kind in an error message
# A checkpoint's key for {"weights": name -> float32, "acts": whether a policy takes them, "updates": n}.
AVERAGE = "average"


def plain(value: Any, place: str) -> Any:
    """A deep copy for `torch.load(weights_only=True)`: lists for tuples, numbers for numpy scalars."""
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise LibrobotError(
        f"{place}: a checkpoint holds numbers, text, None, lists and dictionaries, found "
        f"{type(value).__name__}; convert it before attaching it to the run"
    )


def fit_state_dict(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load `state_dict` into `module`, or raise LibrobotError naming what does not fit.

    Where either waits for its weights (on torch's meta device, or still in a file), they are only compared.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state_dict]
    unexpected = [name for name in state_dict if name not in own]
    mismatched = [
        f"{name} (model {tuple(own[name].shape)}, checkpoint {tuple(state_dict[name].shape)})"
        for name in own
        if name in state_dict and own[name].shape != state_dict[name].shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", mismatched),
        )
        if names
    ]
    if problems:
        raise LibrobotError(
            f"the checkpoint does not fit this {type(module).__name__}; tensors {'; '.join(problems)}. "
            f"Use the configuration that it was trained with (its config.yaml), or another checkpoint"
        )
    stand_ins = (*module.parameters(), *state_dict.values())
    if not any(tensor.is_meta or isinstance(tensor, StoredTensor) for tensor in stand_ins):
        module.load_state_dict(dict(state_dict), strict=True)


def acting_weights(checkpoint: dict[str, Any], weights: str | None = None) -> dict[str, Tensor]:
    """A checkpoint's `state_dict`, with its average in place where the policy acts with that.

    `weights` is "average", "trained", or None for what the run chose. Raises LibrobotError for an average
    that is not there.
    """
    if weights not in (None, "average", "trained"):
        raise LibrobotError(f"weights must be 'average' or 'trained', found {weights!r}")
    stored = checkpoint.get(AVERAGE)
    if stored is None:
        if weights == "average":
            raise LibrobotError(
                "the checkpoint holds no average of the weights; train with callbacks=[default,ema]"
            )
        return checkpoint["state_dict"]
    average = stored["acts"] if weights is None else weights == "average"
    return checkpoint["state_dict"] | (stored["weights"] if average else {})
