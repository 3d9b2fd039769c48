"""Questions and answers for co-fine-tuning a backbone beside robot data (RT-2, Brohan et al. 2023).

A file of JSON lines, one pair a line: {"image": "pictures/1.jpg", "question": "...", "answer": "..."}. A
picture's path counts from the file's folder; without "image" (or null) the pair is text alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from librobot.errors import LibrobotError
from librobot.frameworks.language_decoder import LanguageDecoder
from librobot.types import Observation
from librobot.vlms.base import VLM, Processor, Vocabulary

CAMERA = "picture"


@dataclass
class Drawn:
    """Pairs of one step. A pair without a picture has zeros there, and `has_picture` False."""

    pictures: UInt8[Tensor, "b 1 c h w"]
    has_picture: Bool[Tensor, " b"]
    questions: list[str]
    answers: list[str]

    def observation(self, processor: Processor, device: torch.device) -> tuple[Observation, list[str]]:
        """What a backbone sees of them, and the answers."""
        images = {CAMERA: self.pictures}
        made = Observation(
            images=images,
            image_mask={CAMERA: self.has_picture},
            state=torch.zeros(len(self.questions), 1, 0),
            prompt=self.questions,
            inputs=processor(self.questions, images),
        )
        return made.to(device), self.answers


class Pairs:
    """`ratio` pairs come with each robot sample (0.5: one with every two), and their loss has `weight`.

    Read when first drawn from: a policy that only acts needs no file.
    """

    def __init__(self, *, file: str, ratio: float = 0.5, weight: float = 1.0) -> None:
        if ratio <= 0 or weight <= 0:
            raise ValueError(f"vision_language: ratio and weight must be above 0, found {ratio} and {weight}")
        self.file, self.ratio, self.weight = Path(file), ratio, weight

    @cached_property
    def pairs(self) -> list[dict[str, Any]]:
        """All lines. Raises LibrobotError with the place of a line that is no pair."""
        if not self.file.is_file():
            raise LibrobotError(f"framework.vision_language.file={self.file}: expected a file, found none")
        found = []
        with self.file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    pair = json.loads(line)
                    if not all(isinstance(pair[key], str) for key in ("question", "answer")):
                        raise TypeError
                except (ValueError, KeyError, TypeError):
                    raise LibrobotError(
                        f'{self.file}:{number}: expected {{"image": PATH or null, "question": TEXT, '
                        f'"answer": TEXT}}, found {line.strip()[:80]}'
                    ) from None
                found.append(pair)
        if not found:
            raise LibrobotError(f"{self.file}: expected at least one pair, found none")
        return found

    def draw(self, num_robot_samples: int, size: tuple[int, int]) -> Drawn:
        """Pairs by torch's random numbers, with pictures of `size` (height, width)."""
        count = max(1, round(self.ratio * num_robot_samples))
        chosen = [self.pairs[int(i)] for i in torch.randint(len(self.pairs), (count,))]
        pictures = [self.picture(pair.get("image"), size) for pair in chosen]
        return Drawn(
            pictures=torch.stack(pictures)[:, None],
            has_picture=torch.tensor([pair.get("image") is not None for pair in chosen]),
            questions=[f"Q: {pair['question']} A:" for pair in chosen],
            answers=[pair["answer"] for pair in chosen],
        )

    def picture(self, path: str | None, size: tuple[int, int]) -> UInt8[Tensor, "c h w"]:
        if path is None:
            return torch.zeros(3, *size, dtype=torch.uint8)
        from PIL import Image

        try:
            with Image.open(self.file.parent / path) as opened:
                pixels = np.asarray(opened.convert("RGB").resize((size[1], size[0])))
        except OSError as error:
            raise LibrobotError(f"{self.file}: picture {path!r} cannot be read: {error}") from error
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def padded_answers(
    vocabulary: Vocabulary, texts: Sequence[str], device: torch.device
) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"]]:
    """Answers as tokens, each with the end behind it, and which of them are real."""
    rows = [[*vocabulary.tokenize(f" {text}"), vocabulary.end] for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([row + [vocabulary.end] * (length - len(row)) for row in rows], device=device)
    sizes = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(length, device=device) < sizes[:, None]


def answers(vlm: VLM, decoder: LanguageDecoder, observation: Observation, max_tokens: int) -> list[str]:
    """The likeliest token each time, of all the vocabulary, until every answer has ended."""
    questions = [f"Q: {prompt} A:" for prompt in observation.prompt]
    inputs = vlm.processor(questions, observation.images)
    device = observation.state.device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    seen = Observation(
        observation.images, observation.image_mask, observation.state, questions, inputs=inputs
    )
    writing, tokens = decoder.begin(vlm(seen, layers=(-1,))), None
    rows: list[list[int]] = [[] for _ in questions]
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    for _ in range(max_tokens):
        tokens = writing(tokens).argmax(dim=-1)
        ended = ended | (tokens == vlm.vocabulary.end)
        if bool(ended.all()):
            break
        for row, token, over in zip(rows, tokens.tolist(), ended.tolist(), strict=True):
            if not over:
                row.append(token)
    return [vlm.vocabulary.detokenize(row).strip() for row in rows]
