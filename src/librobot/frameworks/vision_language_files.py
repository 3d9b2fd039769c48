"""Files of pictures, questions and answers, as pairs: JSON lines, LLaVA's JSON, or a folder of such files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from librobot.errors import LibrobotError

PICTURE = "<image>"  # where LLaVA puts the picture into its first question


@dataclass(frozen=True)
class Pair:
    """`image` is the picture's path, None for text alone."""

    image: Path | None
    question: str
    answer: str


def read_pairs(path: Path) -> list[Pair]:
    """All pairs of a file, or of the `.jsonl` and `.json` files of a folder, in their order.

    A line of JSON lines is {"image": PATH or null, "question": TEXT, "answer": TEXT}. A JSON file is LLaVA's
    (Liu et al. 2023): a list of {"image": PATH, "conversations": [{"from": "human" or "gpt", "value": TEXT},
    ...]}, of which every question with its answer is a pair. Pictures are found from the file's folder.

    Raises LibrobotError with the place of what is no pair, and where there is none.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".jsonl", ".json"))
    elif path.is_file():
        files = [path]
    else:
        raise LibrobotError(f"framework.vision_language.file={path}: expected a file, found none")
    found = [pair for file in files for pair in (llava if file.suffix == ".json" else lines)(file)]
    if not found:
        raise LibrobotError(f"{path}: expected at least one pair, found none")
    return found


def lines(file: Path) -> Iterator[Pair]:
    with file.open(encoding="utf-8") as opened:
        for number, line in enumerate(opened, start=1):
            if not line.strip():
                continue
            try:
                pair = json.loads(line)
                made = Pair(picture(file, pair.get("image")), text(pair["question"]), text(pair["answer"]))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise LibrobotError(
                    f'{file}:{number}: expected {{"image": PATH or null, "question": TEXT, "answer": TEXT}}, '
                    f"found {line.strip()[:80]}"
                ) from None
            yield made


def llava(file: Path) -> Iterator[Pair]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LibrobotError(f"{file}: expected LLaVA's JSON, a list of conversations; {error}") from error
    for number, entry in enumerate(entries if isinstance(entries, list) else [None]):
        try:
            image = picture(file, entry.get("image"))
            turns = [(turn["from"], text(turn["value"])) for turn in entry["conversations"]]
        except (KeyError, TypeError, AttributeError):
            raise LibrobotError(
                f'{file}: entry {number}: expected {{"image": PATH, "conversations": [{{"from", "value"}}, '
                f"...]}}, found {str(entry)[:80]}"
            ) from None
        for (asker, question), (speaker, answer) in pairwise(turns):
            if asker in ("human", "user") and speaker in ("gpt", "assistant"):
                yield Pair(image, question.replace(PICTURE, "").strip(), answer.strip())


def picture(file: Path, path: Any) -> Path | None:
    return None if path is None else file.parent / text(path)


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value
