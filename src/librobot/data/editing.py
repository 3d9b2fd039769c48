"""Merging, splitting and filtering datasets: what they give is a LeRobotDataset v3.0."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from rich.console import Console

from librobot.data.check import check
from librobot.data.convert import lerobot_writer, whole_rate, write_episodes
from librobot.data.copying import copy_episodes
from librobot.data.new_folder import new_folder
from librobot.data.selected import SelectedSource, rows_of
from librobot.data.sources.base import Source
from librobot.data.sources.lerobot import LeRobotSource
from librobot.errors import LibrobotError

Parts = Mapping[str, Sequence[tuple[Source, int]]]
"""What goes into which folder below the target ("" the target itself): episodes, by dataset and number."""


def write_parts(
    parts: Parts, target: str | Path, *, rewrite: bool = False, video: bool = False, show: bool = True
) -> Path:
    """Write the episodes to the new folder `target`, which appears when it is whole; called again after an
    interruption it goes on.

    Episodes of LeRobotDatasets are copied with all their columns, pictures and videos as they are. Those of
    other formats, or with `rewrite`, are decoded and written anew, as PNG or, with `video`, encoded: only
    cameras, states, actions and instructions then. Which of the two is said on stderr.

    Raises LibrobotError where `target` exists, or the datasets do not fit together.
    """
    sources = list({id(source): source for part in parts.values() for source, _ in part}.values())
    copied = not rewrite and all(isinstance(source, LeRobotSource) for source in sources)
    roots = [str(source.provenance.get("root")) for source in sources]
    numbers = {
        name: [[sources.index(source), int(episode)] for source, episode in part]
        for name, part in parts.items()
    }
    for name, part in parts.items():
        if not part:
            raise LibrobotError(f"{roots}: no episode is left for {name or target}; choose others")
    if not copied:
        _expect_one_robot(sources)
    console = Console(stderr=True, quiet=not show)
    with new_folder(
        target, {"sources": roots, "parts": numbers, "copied": copied, "video": video}
    ) as partial:
        for name, part in parts.items():
            folder = partial / name
            if copied:
                encoded = copy_episodes(folder, part, show=show)  # type: ignore[arg-type]
                note = f", but for {encoded} videos that had to be encoded anew" if encoded else ""
                console.print(
                    f"{name or Path(target).name}: {len(part)} episodes, copied as they are{note}",
                    soft_wrap=True,
                )
                continue
            rows = {id(source): rows_of(source) for source in sources}
            selected = SelectedSource((source, rows[id(source)][episode]) for source, episode in part)
            writer = lerobot_writer(folder, selected, video, whole_rate(selected, None))
            write_episodes(selected, writer, folder.name, show=show)
            form = "as video" if video else "as PNG"
            console.print(
                f"{name or Path(target).name}: {len(part)} episodes, pictures written anew {form}",
                soft_wrap=True,
            )
    return Path(target).expanduser().absolute()


def _expect_one_robot(sources: Sequence[Source]) -> None:
    first = sources[0].spec
    for source in sources[1:]:
        for what in ("cameras", "state", "action", "control_hz"):
            if getattr(first, what) != getattr(source.spec, what):
                raise LibrobotError(
                    f"{source.provenance.get('root')}: {what}: expected {getattr(first, what)} as in "
                    f"{sources[0].provenance.get('root')}, found {getattr(source.spec, what)}"
                )


def merged(sources: Sequence[Source]) -> Parts:
    """All episodes, one dataset after the other."""
    return {"": [(source, i) for source in sources for i in range(len(source.episode_lengths))]}


def split(source: Source, shares: Mapping[str, float], seed: int) -> Parts:
    """Episodes drawn for each name of `shares`, and the others as train. A share below 1 is one of the
    episodes, rounded, but at least one; from 1 on it is their number.

    Raises LibrobotError where nothing is left for train.
    """
    total = len(source.episode_lengths)
    counts = {n: round(share) if share >= 1 else max(1, round(share * total)) for n, share in shares.items()}
    if min(shares.values(), default=1) <= 0 or sum(counts.values()) >= total:
        raise LibrobotError(
            f"{source.provenance.get('root')}: has {total} episodes, asked for are {counts}; each part "
            "needs one, and train too"
        )
    order = np.random.default_rng(seed).permutation(total)
    parts: dict[str, Int[np.ndarray, " n"]] = {}
    for name, count in counts.items():
        parts[name], order = order[:count], order[count:]
    chosen = {"train": order, **parts}
    return {name: [(source, int(i)) for i in np.sort(episodes)] for name, episodes in chosen.items()}


def filtered(
    source: Source,
    *,
    episodes: str | None = None,
    drop: str | None = None,
    instruction: Sequence[str] = (),
    not_instruction: Sequence[str] = (),
    min_length: int | None = None,
    max_length: int | None = None,
    clean: bool = False,
    show: bool = True,
) -> Parts:
    """The episodes that pass everything given.

    episodes, drop: those to keep or leave out, as "0:50,60". instruction, not_instruction: texts, one of
    which must be, none of which may be, in one of an episode's instructions, in capitals or not.
    min_length, max_length: in frames. clean: leave out those in which `check` finds something.
    """
    total = len(source.episode_lengths)
    kept = np.zeros(total, bool) if episodes is not None else np.ones(total, bool)
    if episodes is not None:
        kept[_numbers(episodes, total)] = True
    if drop is not None:
        kept[_numbers(drop, total)] = False
    kept &= source.episode_lengths >= (min_length or 0)
    kept &= source.episode_lengths <= (max_length or np.inf)
    if instruction or not_instruction:
        texts = ["\n".join(set(source.prompts(rows))).casefold() for rows in rows_of(source)]
        kept &= np.array([not instruction or _holds(text, instruction) for text in texts])
        kept &= np.array([not _holds(text, not_instruction) for text in texts])
    if clean:
        found = check(source, show=show)
        kept[sorted({episode for finding in found for episode in finding.episodes})] = False
    return {"": [(source, int(i)) for i in np.flatnonzero(kept)]}


def _holds(text: str, words: Sequence[str]) -> bool:
    return any(word.casefold() in text for word in words)


def _numbers(text: str, total: int) -> list[int]:
    """The episodes of "0:50,60,-1"; as in Python, the end is left out and -1 is the last."""
    chosen: list[int] = []
    for part in text.split(","):
        if re.fullmatch(r"\s*-?\d+\s*", part) and -total <= int(part) < total:
            chosen.append(int(part) % total)
        elif found := re.fullmatch(r"\s*(-?\d*)\s*:\s*(-?\d*)\s*", part):
            begin, end = (int(number) if number else None for number in found.groups())
            chosen += range(total)[begin:end]
        else:
            raise LibrobotError(
                f"episodes {text!r}: {part!r}: expected a number from 0 to {total - 1} or a range like 0:50"
            )
    return chosen
