"""Other words for the same instruction."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from librobot.data.augmentations.base import check_share
from librobot.errors import LibrobotError, nearest


class Paraphrase:
    """probability: the share of samples whose instruction is said otherwise.

    phrases: instruction -> other ways to say all of it, one of which is taken. For the rest, synonyms: word
    or words -> others, each of which (and the original) is as likely at every place, whole words only,
    whatever their case; then templates: sentences with `{}` for the instruction. file: a YAML with the same
    three keys, whose entries are added.

    Raises ValueError for a template without `{}`, LibrobotError for a file that is not so.
    """

    def __init__(
        self,
        *,
        probability: float = 0.5,
        templates: Sequence[str] = ("{}",),
        synonyms: Mapping[str, Sequence[str]] | None = None,
        phrases: Mapping[str, Sequence[str]] | None = None,
        file: str | None = None,
    ) -> None:
        more = _read(file) if file is not None else {}
        self.probability = check_share("probability", probability)
        self.templates = [*templates, *more.get("templates", ())] or ["{}"]
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(f"templates: expected '{{}}' once for the instruction, found {template!r}")
        self.synonyms = _lists({**(synonyms or {}), **more.get("synonyms", {})}, "synonyms", lower=True)
        self.phrases = _lists({**(phrases or {}), **more.get("phrases", {})}, "phrases", lower=False)
        words = sorted(self.synonyms, key=len, reverse=True)  # the longest first: "pick up" before "pick"
        self._words = re.compile(r"\b(" + "|".join(map(re.escape, words)) + r")\b", re.I) if words else None

    def rewrite(self, prompts: Sequence[str], *, seed: Sequence[int]) -> list[str]:
        random = np.random.default_rng(list(seed))
        return [
            self._other(prompt, random) if random.random() < self.probability else prompt
            for prompt in prompts
        ]

    def _other(self, prompt: str, random: np.random.Generator) -> str:
        if self.phrases.get(prompt):
            return str(random.choice(self.phrases[prompt]))
        said = prompt

        def other(found: re.Match[str]) -> str:
            word = found.group(0)
            choice = int(random.integers(1 + len(self.synonyms[word.lower()])))
            chosen = word if choice == 0 else self.synonyms[word.lower()][choice - 1]
            return chosen.capitalize() if word[0].isupper() else chosen

        if self._words is not None:
            said = self._words.sub(other, said)
        return str(random.choice(self.templates)).replace("{}", said)


def _read(file: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    path = Path(file).expanduser()
    known = ("templates", "synonyms", "phrases")
    try:
        read: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:
        raise LibrobotError(f"augmentation.paraphrase.file: {path} is no readable YAML: {error}") from error
    if not isinstance(read, dict):
        raise LibrobotError(
            f"augmentation.paraphrase.file: {path}: expected the keys {', '.join(known)}, found "
            f"{type(read).__name__}"
        )
    for key in read:
        if key not in known:
            raise LibrobotError(f"augmentation.paraphrase.file: {path}: {key}: {nearest(str(key), known)}")
    return {key: value for key, value in read.items() if isinstance(key, str) and value}


def _lists(given: Mapping[str, Sequence[str]], name: str, *, lower: bool) -> dict[str, list[str]]:
    for key, others in given.items():
        if isinstance(others, str) or not isinstance(others, Sequence):
            raise ValueError(f"{name}: expected a list of texts for {key!r}, found {others!r}")
    return {key.lower() if lower else key: [str(other) for other in others] for key, others in given.items()}
