"""Shards of WebDataset: what lies where in a tar file, and pictures by row."""

from __future__ import annotations

import io
import json
import mmap
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from librobot.errors import LibrobotError

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm")

Place = tuple[int, int]
"""Offset and size in the shard, in bytes."""


@dataclass(frozen=True)
class Members:
    """Which member of a sample is what.

    key: a regular expression with the groups `episode` and `step` that a sample's name matches. state,
    action: members ("state.npy") or keys of JSON ones ("json:joints"), joined in this order. prompt: the
    same, or a member of text ("txt"); None for none.
    """

    key: str
    state: tuple[str, ...]
    action: tuple[str, ...]
    prompt: str | None


def picture_name(member: str) -> str | None:
    """The camera of a member: "front.jpg" is front, "jpg" alone is image; None for other members."""
    stem, _, suffix = member.rpartition(".")
    return (stem or "image") if suffix.lower() in PICTURES else None


def scan_shard(path: Path, wanted: Members) -> dict[str, np.ndarray]:
    """Everything but pixels, with the samples in their order, episodes as they appear:

    episodes (e,) names, lengths (e,), steps (n,), states (n, s), actions (n, a) float32, prompts (p,),
    prompt_of_row (n,), places/CAMERA (n, 2) offset and size, and problems (e,): what is wrong with an
    episode, "" for nothing. `broken` (): what is wrong with the shard itself.

    Raises LibrobotError for what is no tar file and for names that are not those of samples.
    """
    samples, broken = _members(path, wanted)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else io.BytesIO() as data:
            return _read(path, samples, broken, wanted, data)


def _members(path: Path, wanted: Members) -> tuple[dict[str, dict[int, dict[str, Place]]], str]:
    """Episode -> step -> member -> its place, and what is wrong with the shard, "" for nothing."""
    pattern = re.compile(wanted.key)
    samples: dict[str, dict[int, dict[str, Place]]] = {}
    end, size = 0, path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if stem.startswith("__"):  # webdataset's own, which belong to no sample
                    continue
                found = pattern.fullmatch(f"{folder}/{stem}" if folder else stem)
                if found is None:
                    raise LibrobotError(
                        f"{path}: {member.name}: expected a sample's name, EPISODE-STEP.MEMBER; set "
                        "data.source.key to a regular expression with the groups episode and step"
                    )
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                step = samples.setdefault(found["episode"], {}).setdefault(int(found["step"]), {})
                if suffix in step:
                    raise LibrobotError(f"{path}: {member.name}: is in the shard twice; write it again")
                step[suffix] = (member.offset_data, member.size)
                end = member.offset_data + (member.size + 511) // 512 * 512
    except tarfile.ReadError as error:
        if not samples and "end of data" not in str(error):
            raise LibrobotError(
                f"{path}: expected an uncompressed tar file, found {size} bytes of something else "
                f"({error}); unpack or copy it again"
            ) from error
        end = size
    if end + 512 > size:  # a tar file ends with blocks of zeros
        return samples, f"{path}: cut short ({size} bytes); copy the shard again"
    return samples, ""


def _read(
    path: Path,
    samples: Mapping[str, Mapping[int, Mapping[str, Place]]],
    broken: str,
    wanted: Members,
    data: Any,
) -> dict[str, np.ndarray]:
    load = NumpyBytes()
    states, actions, steps, texts, kept = [], [], [], [], []
    problems, lengths = [], []
    expected: dict[str, Any] = {}
    for episode, of_step in samples.items():
        rows: list[tuple[Any, ...]] = []
        problem = ""
        try:
            for step in sorted(of_step):
                sample = Sample(f"{path}: {episode}-{step}", of_step[step], data, load)
                row = sample.read(wanted)
                for what, found in (
                    ("state", len(row[0])),
                    ("action", len(row[1])),
                    ("cameras", sorted(row[3])),
                ):
                    if found != expected.setdefault(what, found):
                        raise LibrobotError(
                            f"{sample.place}: {what}: expected {expected[what]} as in the samples before, "
                            f"found {found}"
                        )
                rows.append((step, *row))
        except LibrobotError as error:
            problem, rows = str(error), []
        problems.append(problem)
        lengths.append(len(rows))
        for step, state, action, text, pictures in rows:
            steps.append(step)
            states.append(state)
            actions.append(action)
            texts.append(text)
            kept.append(pictures)
    prompts = list(dict.fromkeys(texts))
    number = {prompt: i for i, prompt in enumerate(prompts)}
    cameras = sorted(kept[0]) if kept else []
    return {
        "episodes": np.array(list(samples), np.str_),
        "lengths": np.array(lengths, np.int64),
        "problems": np.array(problems, np.str_),
        "broken": np.array(broken),
        "steps": np.array(steps, np.int64),
        "states": np.array(states, np.float32).reshape(len(steps), -1 if steps else 0),
        "actions": np.array(actions, np.float32).reshape(len(steps), -1 if steps else 0),
        "prompts": np.array(prompts, np.str_),
        "prompt_of_row": np.array([number[text] for text in texts], np.int64),
        **{f"places/{c}": np.array([each[c] for each in kept], np.int64).reshape(-1, 2) for c in cameras},
    }


class Sample:
    """One step: its members in a mapped shard."""

    def __init__(self, place: str, members: Mapping[str, Place], data: Any, load: NumpyBytes) -> None:
        self.place, self.members, self.data, self.load = place, members, data, load
        self._json: dict[str, Any] = {}

    def read(self, wanted: Members) -> tuple[np.ndarray, np.ndarray, str, dict[str, Place]]:
        """State, action, instruction, and where each camera's picture lies."""
        pictures = {c: place for m, place in self.members.items() if (c := picture_name(m)) is not None}
        return self.vector(wanted.state), self.vector(wanted.action), self.text(wanted.prompt), pictures

    def vector(self, names: Sequence[str]) -> np.ndarray:
        parts = []
        for name in names:
            try:
                value = np.asarray(self._value(name))
                if value.dtype.kind not in "fiub" or value.ndim > 1:
                    raise ValueError(f"expected numbers (dims,), found {value.dtype} {value.shape}")
                parts.append(value.reshape(-1).astype(np.float32))
            except (ValueError, EOFError) as error:
                raise LibrobotError(f"{self.place}: {name}: {error}") from error
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def text(self, name: str | None) -> str:
        if name is None:
            return ""
        value = self._value(name)
        return value if isinstance(value, str) else str(value)

    def _value(self, name: str) -> Any:
        member, _, key = name.partition(":")
        if member not in self.members:
            raise LibrobotError(
                f"{self.place}: no member {member!r}; found {', '.join(sorted(self.members))}"
            )
        begin, size = self.members[member]
        data = self.data[begin : begin + size]
        if key:
            if member not in self._json:
                self._json[member] = self._parsed(member, data)
            if key not in self._json[member]:
                raise LibrobotError(f"{self.place}: {member}: no {key!r}; found {sorted(self._json[member])}")
            return self._json[member][key]
        return self.load(data) if member.endswith("npy") else data.decode("utf-8", "replace").strip()

    def _parsed(self, member: str, data: bytes) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise LibrobotError(f"{self.place}: {member}: not JSON ({error})") from error
        if not isinstance(value, dict):
            raise LibrobotError(f"{self.place}: {member}: expected a JSON object, found {value!r:.40}")
        return value


class NumpyBytes:
    """Arrays from the bytes of .npy files; the headers of a dataset's files are alike and parsed once."""

    def __init__(self) -> None:
        self._headers: dict[bytes, tuple[tuple[int, ...], np.dtype]] = {}

    def __call__(self, data: bytes) -> np.ndarray:
        """Raises ValueError for what is no whole array of numbers."""
        end = 10 + int.from_bytes(data[8:10], "little")
        header = data[:end]
        if header not in self._headers:
            file = io.BytesIO(data)
            array = np.load(file, allow_pickle=False)
            if data[:8] == b"\x93NUMPY\x01\x00" and array.flags.c_contiguous:
                self._headers[header] = (array.shape, array.dtype)
            return array
        shape, dtype = self._headers[header]
        return np.frombuffer(data, dtype, offset=end).reshape(shape)
