"""Normalisation inside the model: physical units in, numbers near [-1, 1] out, and back.

Every mode is the affine map `y = (x - offset) / scale`, per dimension:

    mean_std   offset = mean               scale = std               ACT (Zhao et al. 2023), pi0 (openpi)
    min_max    offset = (max + min) / 2    scale = (max - min) / 2   Diffusion Policy (Chi et al. 2023)
    quantile   offset = (q99 + q01) / 2    scale = (q99 - q01) / 2   OpenVLA (Kim et al. 2024), pi0.5 (openpi)
    identity   offset = 0                  scale = 1

`min_max` and `quantile` map their interval to [-1, 1]. Nothing is clipped, so `unnormalize` is the exact
inverse of `normalize`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from librobot.errors import LibrobotError, nearest

NormalizationMode = Literal["mean_std", "min_max", "quantile", "identity"]

Embodiment = Int[Tensor, " b"]

Statistics = Mapping[str, Mapping[str, np.ndarray]]
"""Key ("state", "action") -> statistic ("mean", "std", "min", "max", "q01", "q99") -> one value per
dimension. "action_by_step" may stand beside "action", with (steps, dimensions), for `Normalizer.by_step`."""


class Normalizer(nn.Module):
    """Maps "state" and "action" to normalised numbers; its statistics are buffers, saved with the model.

    `dims` gives the width of each key (known from the robot before any data is read, so that a checkpoint
    loads into a fresh module) and `modes` its mode. A dimension whose std or half range is below
    `minimum_spread` (in the dimension's own unit) is only centred, with scale 1: dividing by it would turn
    numerical noise into targets. Where the quantiles coincide but the range does not (a gripper that is
    nearly always open), `quantile` takes the range instead.

    `by_step` gives each step of a chunk statistics of its own, as GR00T N1.6 and N1.7 do for actions relative
    to the state, whose spread grows along the chunk.

    With several `embodiments`, each has statistics of its own: `dims` is the widest one's, a narrower robot's
    padding is left as it is, and the buffers have a leading axis that a sample's `embodiment` (b,) chooses
    from.

    Statistics are fitted once, before training. Buffers stay float32 under any `.to(dtype)`: half precision
    would round a position in metres to millimetres.
    """

    fitted: Tensor

    def __init__(
        self,
        dims: Mapping[str, int],
        modes: Mapping[str, NormalizationMode],
        *,
        minimum_spread: float = 1e-4,
        embodiments: int = 1,
    ) -> None:
        super().__init__()
        for key, mode in modes.items():
            if key not in dims:
                raise ValueError(f"normalization of {key!r}: {nearest(key, dims)}")
            if mode not in get_args(NormalizationMode):
                raise ValueError(
                    f"normalization of {key!r}: unknown mode {mode!r}; "
                    f"{nearest(mode, get_args(NormalizationMode))}"
                )
        if missing := sorted(set(dims) - set(modes)):
            raise ValueError(f"normalization: no mode for {', '.join(missing)}")
        if not minimum_spread > 0:
            raise ValueError(f"minimum_spread must be above 0, found {minimum_spread}")
        self.dims = dict(dims)
        self.modes = dict(modes)
        self.minimum_spread = minimum_spread
        self.embodiments = embodiments
        self._steps: dict[str, int] = {}
        for key in self.dims:
            self._make_buffers(key)
        self.register_buffer("fitted", torch.tensor(False))
        self._known_fitted = False
        self._left: dict[str, list[np.ndarray]] = {}

    def fit(self, statistics: Statistics | Sequence[Statistics], *, force: bool = False) -> None:
        """Take the statistics of a dataset: `{key: {"mean": (dim,), "std": ..., "min", "max", "q01",
        "q99"}}`; a list of them for several embodiments, in their order. With `by_step`, a statistic may be
        (steps, dim), under "action_by_step" if "action" is there too: further steps of a chunk take the
        last one's, and one of shape (dim,) is every step's.

        Raises LibrobotError where they were fitted before (unless `force`), lack a key or do not fit `dims`.
        """
        if bool(self.fitted) and not force:
            raise LibrobotError(
                "the normalizer holds statistics already; they are fitted once, before training, and kept on "
                "resume. Use fit(statistics, force=True) to replace them on purpose"
            )
        each = [statistics] if isinstance(statistics, Mapping) else list(statistics)
        if len(each) != self.embodiments:
            raise LibrobotError(
                f"the normalizer wants statistics of {self.embodiments} robots, found those of {len(each)}"
            )
        for key, dim in self.dims.items():
            if self.modes[key] == "identity":
                continue
            for index, own in enumerate(each):
                if key not in own:
                    raise LibrobotError(f"no statistics for {key!r}: {nearest(key, own)}")
                values = own.get(f"{key}_by_step", own[key]) if key in self._steps else own[key]
                known = np.shape(values.get("mean", values.get("min", [])))[-1:]
                width = dim if self.embodiments == 1 else min(dim, *known)
                offset, scale = self._affine(key, width, values)
                if key in self._left:
                    left = self._left[key][index][:width]
                    offset, scale = np.where(left, 0.0, offset), np.where(left, 1.0, scale)
                row = index if self.embodiments > 1 else ...
                getattr(self, f"{key}_offset")[row][..., :width].copy_(torch.from_numpy(offset))
                getattr(self, f"{key}_scale")[row][..., :width].copy_(torch.from_numpy(scale))
        self.fitted.fill_(True)

    def leave(self, key: str, dims: Sequence[Sequence[bool]]) -> None:
        """Leave dimensions of `key` in physical units, whatever the mode, as Octo leaves the gripper.

        `dims` says which, for each embodiment. To be called before `fit`.
        """
        self._left[key] = [np.asarray(own, dtype=bool) for own in dims]

    def by_step(self, key: str, steps: int) -> None:
        """Give each of a chunk's `steps` its own statistics of `key`. To be called before `fit`."""
        self._steps[key] = steps
        self._make_buffers(key)

    def normalize(
        self, key: str, x: Float[Tensor, "b *t dim"], embodiment: Embodiment | None = None
    ) -> Float[Tensor, "b *t dim"]:
        """`x` in physical units -> normalised, in `x`'s dtype. `embodiment` None is the first for all."""
        offset, scale = self._statistics_for(key, x, embodiment)
        return ((x - offset) / scale).to(x.dtype)

    def unnormalize(
        self, key: str, x: Float[Tensor, "b *t dim"], embodiment: Embodiment | None = None
    ) -> Float[Tensor, "b *t dim"]:
        """Normalised `x` -> physical units, in `x`'s dtype: the inverse of `normalize`."""
        offset, scale = self._statistics_for(key, x, embodiment)
        return (x * scale + offset).to(x.dtype)

    def _statistics_for(self, key: str, x: Tensor, embodiment: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self._known_fitted:  # reading the buffer would wait for the device on every call
            self._known_fitted = bool(self.fitted)
        if not self._known_fitted:
            raise LibrobotError(
                "the normalizer has no statistics yet: call fit(datamodule.statistics) before training, or "
                "load a checkpoint that holds them"
            )
        if key not in self.dims:
            raise LibrobotError(f"the normalizer does not know {key!r}: {nearest(key, self.dims)}")
        if x.shape[-1] != self.dims[key]:
            raise LibrobotError(
                f"normalizer: {key} has {self.dims[key]} dimensions, found a tensor of shape {tuple(x.shape)}"
            )
        offset, scale = getattr(self, f"{key}_offset"), getattr(self, f"{key}_scale")
        if key in self._steps:
            if x.shape[-2] > self._steps[key]:
                raise LibrobotError(
                    f"normalizer: {key} has statistics of {self._steps[key]} steps, found a tensor of shape "
                    f"{tuple(x.shape)}"
                )
            offset, scale = offset[..., : x.shape[-2], :], scale[..., : x.shape[-2], :]
        if self.embodiments == 1:
            return offset, scale
        if embodiment is None:
            return offset[0], scale[0]
        if key in self._steps:
            return offset[embodiment], scale[embodiment]
        shape = (len(embodiment), *[1] * (x.ndim - 2), -1)
        return offset[embodiment].view(shape), scale[embodiment].view(shape)

    def _make_buffers(self, key: str) -> None:
        shape: tuple[int, ...] = (self.dims[key],)
        if key in self._steps:
            shape = (self._steps[key], *shape)
        if self.embodiments > 1:
            shape = (self.embodiments, *shape)
        self.register_buffer(f"{key}_offset", torch.zeros(shape, dtype=torch.float32))
        self.register_buffer(f"{key}_scale", torch.ones(shape, dtype=torch.float32))

    def _affine(
        self, key: str, dim: int, statistics: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        needed = {"mean_std": ("mean", "std"), "min_max": ("min", "max")}.get(
            self.modes[key], ("q01", "q99", "min", "max")
        )
        values = []
        for name in needed:
            value = np.asarray(statistics.get(name, np.nan), dtype=np.float64)
            if key in self._steps:
                value = every_step(value, self._steps[key])
            expected = (self._steps[key], dim) if key in self._steps else (dim,)
            if value.shape != expected or not np.isfinite(value).all():
                raise LibrobotError(
                    f"statistics of {key!r}: {name!r} must hold {dim} finite values, found shape "
                    f"{value.shape}: {np.array2string(value, threshold=8)}"
                )
            values.append(value)
        if self.modes[key] == "mean_std":
            offset, scale = values
        else:
            low, high = values[:2]
            if self.modes[key] == "quantile":
                collapsed = (high - low) / 2 < self.minimum_spread
                low, high = np.where(collapsed, values[2], low), np.where(collapsed, values[3], high)
            offset, scale = (high + low) / 2, (high - low) / 2
        return offset, np.where(scale < self.minimum_spread, 1.0, scale)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known_fitted = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Normalizer:
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in exact.items():  # move, but keep every bit
            moved = self._buffers[name]
            if value is not None and moved is not None and moved.dtype != value.dtype:
                self._buffers[name] = value.to(moved.device)
        return self


def every_step(value: Float[np.ndarray, "*n dim"], steps: int) -> Float[np.ndarray, "steps dim"]:
    """A statistic of every step: of fewer steps (or of none in particular) the last one's goes on."""
    rows = np.atleast_2d(value)[:steps]
    return np.concatenate((rows, np.repeat(rows[-1:], steps - len(rows), axis=0)))
