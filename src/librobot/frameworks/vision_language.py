"""Questions and answers for co-training a backbone beside robot data (RT-2, Brohan et al. 2023; pi0.5).

    loss = action loss + weight * mean over pairs of the cross-entropy of an answer's tokens

The files are JSON lines, LLaVA's JSON, or folders of them: see `vision_language_files`. A framework that can
write (RT-2, pi0.5, pi0-FAST) takes them as `vision_language={file, ratio, weight}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from librobot.errors import LibrobotError
from librobot.frameworks.language_decoder import ActionTokens, LanguageDecoder, answer_loss
from librobot.frameworks.vision_language_files import Pair, read_pairs
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
    """`ratio` pairs come with each robot sample (0.5: one with every two; one at least with every batch), and
    their loss has `weight`.

    Read when first drawn from: a policy that only acts needs no file.
    """

    def __init__(self, *, file: str, ratio: float = 0.5, weight: float = 1.0) -> None:
        if ratio <= 0 or weight <= 0:
            raise ValueError(f"vision_language: ratio and weight must be above 0, found {ratio} and {weight}")
        self.file, self.ratio, self.weight = Path(file), ratio, weight

    @cached_property
    def pairs(self) -> list[Pair]:
        return read_pairs(self.file)

    def draw(self, num_robot_samples: int, size: tuple[int, int]) -> Drawn:
        """Pairs by torch's random numbers, with pictures of `size` (height, width)."""
        count = max(1, round(self.ratio * num_robot_samples))
        chosen = [self.pairs[int(i)] for i in torch.randint(len(self.pairs), (count,))]
        return Drawn(
            pictures=torch.stack([self.picture(pair.image, size) for pair in chosen])[:, None],
            has_picture=torch.tensor([pair.image is not None for pair in chosen]),
            questions=[f"Q: {pair.question} A:" for pair in chosen],
            answers=[pair.answer for pair in chosen],
        )

    def picture(self, path: Path | None, size: tuple[int, int]) -> UInt8[Tensor, "c h w"]:
        if path is None:
            return torch.zeros(3, *size, dtype=torch.uint8)
        from PIL import Image

        try:
            with Image.open(path) as opened:
                pixels = np.asarray(opened.convert("RGB").resize((size[1], size[0])))
        except OSError as error:
            raise LibrobotError(f"{self.file}: picture {str(path)!r} cannot be read: {error}") from error
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


class CoTraining:
    """A backbone that goes on learning to answer beside a framework's actions; `None` for `options` does
    nothing. `tokens` are the framework's action tokens, where it has any: answers are written in words alone.
    `packing` are `LanguageDecoder`'s options for it.
    """

    def __init__(
        self,
        vlm: VLM,
        options: Mapping[str, Any] | None,
        tokens: ActionTokens | Words | None = None,
        **packing: Any,
    ) -> None:
        self.vlm = vlm
        self.pairs = None if options is None else Pairs(**options)
        self.decoder = LanguageDecoder(vlm, tokens or Words(), **packing)

    def add(
        self, loss: Tensor, num_robot_samples: int, size: tuple[int, int], training: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the two losses, in training, and both of them."""
        if self.pairs is None or not training:
            return loss, {}
        spoken = self.pairs.weight * self.answering(self.pairs.draw(num_robot_samples, size), loss.device)
        return loss + spoken, {"action_loss": loss.detach(), "vision_language_loss": spoken.detach()}

    def answering(self, drawn: Drawn, device: torch.device) -> Tensor:
        """The mean over pairs of their answers' mean cross-entropy."""
        observation, texts = drawn.observation(self.vlm.processor, device)
        ids, real = padded_answers(self.vlm.vocabulary, texts, device)
        return answer_loss(self.decoder, self.decoder.read(observation), ids, real).mean()


class Words:
    """The backbone's vocabulary as it is, where `LanguageDecoder` asks for action tokens."""

    def embed(self, vlm: VLM, ids: Int[Tensor, "b l"]) -> Tensor:
        return vlm.embed_tokens(ids)

    def logits(self, vlm: VLM, hidden: Tensor) -> Tensor:
        return vlm.logits(hidden)


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
