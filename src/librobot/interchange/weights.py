"""Two names for one tensor: a table that turns a published checkpoint's state dict into ours, and back.

A rule is a pair of patterns, `(theirs, ours)`. A `*` stands for any text (with dots); the n-th `*` of one
side is the n-th of the other. The first rule that fits a name decides: exceptions stand before the general
case.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from librobot.errors import LibrobotError

TensorMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """One line of the table. `to_ours` and `to_theirs` change the tensor itself, as a squeezed convolution
    does; None leaves it."""

    theirs: str
    ours: str
    to_ours: TensorMap | None = None
    to_theirs: TensorMap | None = None

    def __post_init__(self) -> None:
        if self.theirs.count("*") != self.ours.count("*"):
            raise ValueError(f"both sides must have as many *, found {self.theirs!r} and {self.ours!r}")


@dataclass(frozen=True)
class Fused:
    """Several of our tensors that the other layout keeps in one, side by side along `dim`.

    `sizes` are the lengths along `dim` in the order of `ours`; None: equal parts.
    """

    theirs: str
    ours: tuple[str, ...]
    dim: int = 0
    sizes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class WeightMap:
    """The whole table of a model.

    `copies` maps a name of theirs that repeats another of theirs (tied weights) to the one it repeats: it is
    left out on the way in, provided the two are equal, and written again on the way out. `unused` are
    patterns of their tensors that no computation of ours needs; `made` gives what to write for them on the
    way out (name -> tensor), so that strict readers are content. `absent` are patterns of our tensors that
    the other layout does not hold (statistics, which live in files of their own).
    """

    rules: Sequence[Rule | Fused]
    copies: Mapping[str, str] = field(default_factory=dict)
    unused: Sequence[str] = ()
    made: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    absent: Sequence[str] = ("normalizer.*",)

    def to_ours(self, state_dict: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
        """Our names for all of `state_dict`. Raises LibrobotError that names `place` and a tensor that no
        rule knows, or that should repeat another and does not."""
        import torch

        found: dict[str, Tensor] = {}
        for name, tensor in state_dict.items():
            if name in self.copies:
                original = state_dict.get(self.copies[name])
                if original is None:
                    found |= self._converted(self.copies[name], tensor, place)
                elif not torch.equal(original, tensor):
                    raise LibrobotError(
                        f"{place}: {name} must equal {self.copies[name]}, as tied weights do, and differs; "
                        f"the file is damaged or of another model"
                    )
                continue
            if any(_matches(pattern, name) is not None for pattern in self.unused):
                continue
            found |= self._converted(name, tensor, place)
        return found

    def to_theirs(self, state_dict: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
        """Their names for all of `state_dict`. Raises LibrobotError where no rule knows a tensor of ours."""
        import torch

        made: dict[str, Tensor] = {}
        parts: dict[tuple[str, int], dict[int, Tensor]] = {}
        for name, tensor in state_dict.items():
            if any(_matches(pattern, name) is not None for pattern in self.absent):
                continue
            theirs = None
            for index, rule in enumerate(self.rules):
                if isinstance(rule, Fused):
                    for part, pattern in enumerate(rule.ours):
                        if (stars := _matches(pattern, name)) is not None:
                            theirs = _filled(rule.theirs, stars)
                            parts.setdefault((theirs, index), {})[part] = tensor
                            break
                elif (stars := _matches(rule.ours, name)) is not None:
                    theirs = _filled(rule.theirs, stars)
                    made[theirs] = rule.to_theirs(tensor) if rule.to_theirs else tensor
                if theirs is not None:
                    break
            if theirs is None:
                raise LibrobotError(f"{place}: the other layout has no place for our tensor {name}")
        for (theirs, index), pieces in parts.items():
            rule = self.rules[index]
            assert isinstance(rule, Fused)
            made[theirs] = torch.cat([pieces[i] for i in range(len(rule.ours))], dim=rule.dim)
        for copy, original in self.copies.items():
            if original in made:
                made[copy] = made[original].clone()
        return made | dict(self.made(made) if self.made else {})

    def _converted(self, name: str, tensor: Tensor, place: str) -> dict[str, Tensor]:
        for rule in self.rules:
            stars = _matches(rule.theirs, name)
            if stars is None:
                continue
            if isinstance(rule, Rule):
                return {_filled(rule.ours, stars): rule.to_ours(tensor) if rule.to_ours else tensor}
            if rule.sizes is None:
                if tensor.shape[rule.dim] % len(rule.ours):
                    raise LibrobotError(
                        f"{place}: {name} must split into {len(rule.ours)} equal parts along dimension "
                        f"{rule.dim}, found shape {tuple(tensor.shape)}"
                    )
                pieces = tensor.chunk(len(rule.ours), dim=rule.dim)
            else:
                if tensor.shape[rule.dim] != sum(rule.sizes):
                    raise LibrobotError(
                        f"{place}: {name} must have {sum(rule.sizes)} rows along dimension {rule.dim}, found "
                        f"shape {tuple(tensor.shape)}"
                    )
                pieces = tensor.split(list(rule.sizes), dim=rule.dim)
            return {
                _filled(ours, stars): piece.clone() for ours, piece in zip(rule.ours, pieces, strict=True)
            }
        raise LibrobotError(
            f"{place}: no part of the model takes the tensor {name} (shape {tuple(tensor.shape)}); is it the "
            f"checkpoint of another model?"
        )


def _matches(pattern: str, name: str) -> tuple[str, ...] | None:
    """What each `*` of the pattern stands for in `name`; None where it does not fit."""
    found = re.fullmatch("(.*)".join(re.escape(piece) for piece in pattern.split("*")), name)
    return None if found is None else found.groups()


def _filled(pattern: str, stars: tuple[str, ...]) -> str:
    pieces = pattern.split("*")
    return "".join(a + b for a, b in zip(pieces, (*stars, ""), strict=True))
