"""Bags of MCAP files as episodes: every topic at the steps of one control rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from librobot.data.scans import scanned
from librobot.data.sources.mcap_files import Wanted, scan_file
from librobot.errors import LibrobotError, nearest
from librobot.types import Dim


@dataclass(frozen=True)
class TopicTerm:
    """Part of a state or action.

    field: of the message ("position", "pose.position.x"), or several. joints: of a joint state, by its own
    names. next: the value at the following step, for actions that are the next state. names: None takes the
    message's own, or TOPIC_0, ...; unit, kind, mode: see `librobot.types.Dim`.
    """

    topic: str
    field: str | Sequence[str] = "position"
    joints: Sequence[str] = ()
    next: bool = False
    names: Sequence[str] | None = None
    unit: str = ""
    kind: str = "other"
    mode: str = "absolute"

    @classmethod
    def parse(cls, described: Mapping[str, Any], place: str) -> TopicTerm:
        known = [f.name for f in fields(cls)]
        for key in described:
            if key not in known:
                raise ValueError(f"{place}: unknown {key!r}; {nearest(str(key), known)}")
        if "topic" not in described:
            raise ValueError(f"{place}: lacks topic, found {dict(described)}")
        return cls(**described)

    @property
    def key(self) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        names = (self.field,) if isinstance(self.field, str) else tuple(self.field)
        return self.topic, names, tuple(self.joints)

    def dims(self, size: int, own: Sequence[str], place: str) -> list[Dim]:
        stem = self.topic.strip("/").replace("/", "_")
        names = list(self.names or own or (f"{stem}_{i}" for i in range(size)))
        if len(names) != size:
            raise ValueError(f"{place}: {len(names)} names for the {size} values of {self.topic}")
        return [Dim(name, self.unit, self.kind, self.mode) for name in names]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Bag:
    """One episode: its files, and for each step the file and message of every topic."""

    place: str
    paths: list[Path]
    state: np.ndarray
    action: np.ndarray
    names: dict[int, list[str]]
    prompts: list[str]
    pictures: dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class BagReader:
    """How bags become episodes; see `McapSource` for the options. terms: the first `num_state` are the
    state's, the others the action's."""

    wanted: Wanted
    terms: Sequence[TopicTerm]
    num_state: int
    pictures: Mapping[str, str]
    prompt: str | None
    prompt_topic: str | None
    control_hz: float
    max_age: float | None

    def __call__(self, paths: list[Path]) -> Bag:
        """Raises LibrobotError, by file and topic."""
        described = [asdict(self.wanted)]
        scans = [scanned("mcap", path, described, partial(scan_file, path, self.wanted)) for path in paths]
        place = str(paths[0] if len(paths) == 1 else paths[0].parent)

        def joined(key: str) -> np.ndarray:
            return np.concatenate([scan[key] for scan in scans])

        timed = {*self.wanted.pictures, *(term.topic for term in self.terms)}
        times, order = {}, {}
        for topic in sorted(timed):
            stamps = joined(f"stamps/{topic}")
            if not len(stamps):
                raise LibrobotError(f"{place}: {topic}: has no message; expected some")
            order[topic] = np.argsort(stamps, kind="stable")
            times[topic] = stamps[order[topic]]
        ticks = _ticks({topic: (int(t[0]), int(t[-1])) for topic, t in times.items()}, self.control_hz, place)
        chosen = {t: _last_before(times[t], ticks, self.max_age, f"{place}: {t}") for t in sorted(timed)}
        chosen = {topic: order[topic][index] for topic, index in chosen.items()}
        shifted = any(term.next for term in self.terms)
        length = len(ticks) - shifted
        if length < 1:
            raise LibrobotError(f"{place}: has one step, and the last has no next one for the action")
        parts = []
        for term in self.terms:
            values = joined(f"values/{self.wanted.values.index(term.key)}")[chosen[term.topic]]
            parts.append((values[1:] if term.next else values)[:length].astype(np.float32))
        empty = np.zeros((length, 0), np.float32)
        file = {
            t: np.repeat(np.arange(len(scans)), [len(s[f"where/{t}"]) for s in scans])
            for t in self.wanted.pictures
        }
        names = {
            i: [str(scans[0][f"values/{i}"].shape[1]), *scans[0][f"names/{i}"].tolist()]
            for i in range(len(self.wanted.values))
        }
        folder = paths[0].parent
        default = self.prompt or (folder.name if (folder / "metadata.yaml").exists() else paths[0].stem)
        return Bag(
            place=place,
            paths=paths,
            state=np.concatenate([empty, *parts[: self.num_state]], axis=1),
            action=np.concatenate(parts[self.num_state :], axis=1),
            names=names,
            prompts=self._prompts(joined, ticks[:length], default.replace("_", " "), place),
            pictures={
                camera: (file[t][chosen[t][:length]], joined(f"where/{t}")[chosen[t][:length]])
                for camera, t in self.pictures.items()
            },
        )

    def _prompts(self, joined: Any, ticks: Int[np.ndarray, " n"], default: str, place: str) -> list[str]:
        if self.prompt_topic is None:
            return [default] * len(ticks)
        texts, stamps = joined("texts/0"), joined(f"stamps/{self.prompt_topic}")
        if not len(stamps):
            raise LibrobotError(f"{place}: {self.prompt_topic}: has no message; expected the instruction")
        order = np.argsort(stamps, kind="stable")
        index = np.maximum(np.searchsorted(stamps[order], ticks, side="right") - 1, 0)
        return texts[order][index].tolist()

    def dims(self, bag: Bag, begin: int, end: int) -> tuple[Dim, ...]:
        dims: list[Dim] = []
        for term in self.terms[begin:end]:
            number = self.wanted.values.index(term.key)
            size = bag.names[number][0]
            dims += term.dims(int(size), bag.names[number][1:], f"data.source: {term.topic}")
        if len({dim.name for dim in dims}) < len(dims):
            dims = [Dim(f"{d.name}_{i}", d.unit, d.kind, d.mode) for i, d in enumerate(dims)]
        return tuple(dims)


def _ticks(ends: Mapping[str, tuple[int, int]], hz: float, place: str) -> Int[np.ndarray, " n"]:
    """The times of the steps, in ns: while every topic has begun and none has ended."""
    late = max(ends, key=lambda topic: ends[topic][0])
    early = min(ends, key=lambda topic: ends[topic][1])
    begin, end = ends[late][0], ends[early][1]
    if end < begin:
        raise LibrobotError(
            f"{place}: its topics share no time: {late} begins {(begin - end) / 1e9:.3f} s after {early} ends"
        )
    count = int((end - begin) * hz / 1e9 + 1e-6) + 1
    return begin + np.round(np.arange(count) * (1e9 / hz)).astype(np.int64)


def _last_before(
    times: Int[np.ndarray, " m"], ticks: Int[np.ndarray, " n"], max_age: float | None, place: str
) -> Int[np.ndarray, " n"]:
    index = np.searchsorted(times, ticks, side="right") - 1
    age = (ticks - times[index]) / 1e9
    if max_age is not None and age.max() > max_age:
        step = int(np.argmax(age > max_age))
        raise LibrobotError(
            f"{place}: step {step}: its last message is {age[step]:.3f} s old, above max_age={max_age:g}; "
            "the topic paused. Record again, or raise data.source.max_age (null: any age)"
        )
    return index
