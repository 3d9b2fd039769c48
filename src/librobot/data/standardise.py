"""State and action vectors composed of a dataset's fields, as a configuration describes them.

The conventions are those of Octo and OpenVLA for Open X-Embodiment (octo/data/oxe, prismatic/vla/datasets/
rlds/oxe): end-effector deltas, a gripper action of 1 for open and 0 for closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from librobot.errors import nearest
from librobot.types import Dim, DimKind

Vector = Float[np.ndarray, "t dim"]


def invert(x: Vector) -> Vector:
    """1 - x: closed and open exchanged."""
    return 1 - x


def clip(x: Vector) -> Vector:
    """Into [0, 1]."""
    return x.clip(0, 1)


def binarize(x: Vector) -> Vector:
    """Above 0.95 open, below 0.05 closed; what lies between takes the state that is reached after it. At the
    episode's end it takes the last value."""
    out, carry = np.empty_like(x), x[-1]
    for i in reversed(range(len(x))):
        carry = np.where(x[i] > 0.95, 1, np.where(x[i] < 0.05, 0, carry))
        out[i] = carry
    return out


def absolute_gripper(x: Vector) -> Vector:
    """Relative gripper actions (+1 closes, -1 opens) as absolute ones (1 open, 0 closed). The first one is
    taken not to be redundant; without any the gripper is open."""
    change = np.where(x < -0.1, 1, np.where(x > 0.1, -1, 0))
    first = np.take_along_axis(change, (change != 0).argmax(axis=0)[None], axis=0)[0]
    carry, out = np.where(first == 0, 1, -first), np.empty_like(x)
    for i in range(len(x)):
        carry = np.where(change[i] == 0, carry, change[i])
        out[i] = carry / 2 + 0.5
    return out


def reached(x: Vector) -> Vector:
    """x[i + 1] - x[i]: what the step really did; 0 at the last step (drop it with drop_last: 1)."""
    return np.diff(x, axis=0, append=x[-1:])


def euler(x: Vector) -> Vector:
    """Quaternions (x, y, z, w) as angles about fixed x, y, z axes, in radians."""
    from scipy.spatial.transform import Rotation

    return Rotation.from_quat(x).as_euler("xyz").astype(np.float32)


STEPS: dict[str, Callable[[Vector], Vector]] = {
    f.__name__: f for f in (invert, clip, binarize, absolute_gripper, reached, euler)
}


@dataclass(frozen=True)
class Term:
    """Some dimensions of a vector: a field (or a constant), a part of it, and what is done to it, in order.

    take: [start, stop] of the field's dimensions, negative from the end, or null for all. names and the rest
    describe the dimensions.
    """

    field: str | None = None
    take: tuple[int | None, int | None] | None = None
    then: tuple[str, ...] = ()
    fill: float | None = None
    count: int = 1
    names: tuple[str, ...] = ()
    kind: DimKind = "other"
    unit: str = ""
    mode: str = "absolute"

    @classmethod
    def parse(cls, described: str | Mapping[str, Any], place: str) -> Term:
        """From a field's name or a mapping. Raises ValueError that names `place`."""
        if isinstance(described, str):
            return cls(field=described)
        known = list(cls.__dataclass_fields__)
        for key in described:
            if key not in known:
                raise ValueError(f"{place}.{key}: {nearest(key, known)}")
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, Sequence) and not isinstance(v, str) else v
            for k, v in described.items()
        }
        if isinstance(values.get("then"), str):
            values["then"] = (values["then"],)
        term = cls(**values)
        if (term.field is None) == (term.fill is None):
            raise ValueError(f"{place}: expected either field or fill, found {dict(described)}")
        for step in term.then:
            if step not in STEPS:
                raise ValueError(f"{place}.then: {nearest(step, STEPS)}")
        return term

    def value(
        self, fields: Mapping[str, np.ndarray], lengths: Int[np.ndarray, " e"]
    ) -> Float[np.ndarray, "n dim"]:
        """Over all steps, (n, dims) float32. `fields` maps a name to (n, ...); raises KeyError for others."""
        total = int(lengths.sum())
        if self.field is None:
            return np.full((total, self.count), self.fill, np.float32)
        x: np.ndarray = np.asarray(fields[self.field]).reshape(total, -1)
        if self.take is not None:
            x = x[:, slice(*self.take)]
        x = x.astype(np.float32)
        for name in self.then:
            parts = np.split(x, np.cumsum(lengths)[:-1])
            x = np.concatenate([STEPS[name](part) for part in parts]).astype(np.float32)
        return x

    def dims(self, size: int, place: str) -> list[Dim]:
        """What its `size` dimensions are. Raises ValueError where as many names are not given."""
        names = list(self.names)
        if not names:
            stem = self.field.replace("/", "_") if self.field else "constant"
            names = [stem] if size == 1 else [f"{stem}_{i}" for i in range(size)]
        if len(names) != size:
            raise ValueError(f"{place}: {len(names)} names for the {size} dimensions of {self.field}")
        return [Dim(name, self.unit, self.kind, self.mode) for name in names]  # type: ignore[arg-type]


def fields_of(terms: Sequence[str | Mapping[str, Any]], known: Iterable[str], place: str) -> list[str]:
    """The fields that `terms` take. Raises ValueError, that names `place`, for one that is not `known`."""
    found = []
    for i, described in enumerate(terms):
        term = Term.parse(described, f"{place}[{i}]")
        if term.field is not None and term.field not in known:
            raise ValueError(
                f"{place}[{i}]: no field {term.field!r} of numbers; {nearest(term.field, known)}"
            )
        found += [term.field] if term.field is not None else []
    return found


def compose(
    terms: Sequence[str | Mapping[str, Any]],
    fields: Mapping[str, np.ndarray],
    lengths: Int[np.ndarray, " e"],
    place: str,
) -> tuple[Float[np.ndarray, "n dim"], list[Dim]]:
    """The terms side by side, and what each dimension is. Raises ValueError that names `place`."""
    fields_of(terms, fields, place)
    values, dims = [np.zeros((int(lengths.sum()), 0), np.float32)], []
    for i, described in enumerate(terms):
        term = Term.parse(described, f"{place}[{i}]")
        value = term.value(fields, lengths)
        values.append(value)
        dims += term.dims(value.shape[1], f"{place}[{i}]")
    seen: dict[str, int] = {}
    for i, dim in enumerate(dims):
        seen[dim.name] = seen.get(dim.name, 0) + 1
        if seen[dim.name] > 1:
            dims[i] = Dim(f"{dim.name}_{seen[dim.name]}", dim.unit, dim.kind, dim.mode)
    return np.concatenate(values, axis=1), dims
