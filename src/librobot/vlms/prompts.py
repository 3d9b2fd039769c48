"""Prompts of published backbones: a family's template around the instruction, and places for pictures."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from librobot.errors import LibrobotError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Template:
    """How a family writes a turn of its conversation: `head`, each picture, `lead`, the instruction, `tail`.

    `picture` holds `image_token` once; the processor repeats it as often as the picture has tokens. All
    special tokens are spelled out: the tokenizer adds none of its own.
    """

    image_token: str
    picture: str
    head: str = ""
    lead: str = ""
    tail: str = ""

    def text(self, prompt: str, num_pictures: int) -> str:
        return self.head + self.picture * num_pictures + self.lead + prompt + self.tail


class PromptProcessor:
    """Prompts and the sizes of pictures to token ids: light and picklable, for data workers.

    Returns, for the longest prompt's length l,

        input_ids       (b, l)  placeholders where a picture's features go; padded on the right
        attention_mask  (b, l)  True on real tokens
        camera          (b, l)  0 for text, 1 + the camera's number for a picture's placeholders
        position_ids    (b, l), or (b, 3, l) for families with temporal, vertical and horizontal positions
        next_position   (b,)    of the first token that follows the prefix
        advance         (b, l)  how far each token moves the positions of those after it

    Pictures come camera by camera, a camera's steps oldest first. An instruction of more than
    `max_prompt_tokens` tokens is cut there, with a warning that shows what was cut.
    """

    first_position = 0

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        max_prompt_tokens: int,
        tokens_per_picture: int = 0,
    ) -> None:
        if max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens must be at least 1, found {max_prompt_tokens}")
        self.tokenizer = tokenizer
        self.template = template
        self.max_prompt_tokens = max_prompt_tokens
        self.tokens_per_picture = tokens_per_picture
        self.image_token_id = token_id(tokenizer, template.image_token)
        self.known: dict[tuple[str, int], list[int]] = {}

    def picture_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of a picture of this size, in pixels."""
        return 1, self.tokens_per_picture

    def __call__(self, prompts: list[str], images: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        grids = [
            (camera, self.picture_grid(*image.shape[-2:]))
            for camera, image in enumerate((images or {}).values(), start=1)
            for _ in range(image.shape[1])
        ]
        rows = [self._expand(self._encode(prompt, len(grids)), grids) for prompt in prompts]
        length = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id or 0
        input_ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])
        camera = torch.tensor([cameras + [0] * (length - len(cameras)) for _, cameras in rows])
        sizes = torch.tensor([len(ids) for ids, _ in rows])
        mask = torch.arange(length) < sizes[:, None]
        positions, advance = self.positions(camera, [grid for _, grid in grids])
        advance = advance * mask
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "camera": camera,
            "position_ids": positions,
            "next_position": advance.sum(dim=1) + self.first_position,
            "advance": advance,
        }

    def positions(
        self, camera: Int[Tensor, "b l"], grids: list[tuple[int, int]]
    ) -> tuple[Tensor, Int[Tensor, "b l"]]:
        """Position of every token, and how far it moves the position of the next."""
        running = torch.arange(camera.shape[1]) + self.first_position
        return running.expand_as(camera).contiguous(), torch.ones_like(camera)

    def _encode(self, prompt: str, num_pictures: int) -> list[int]:
        """Token ids with one placeholder for each picture."""
        key = (prompt, num_pictures)
        if key not in self.known:
            if len(self.known) > 4096:
                self.known.clear()
            text = self.template.text(self._cut(prompt), num_pictures)
            self.known[key] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.known[key]

    def _cut(self, prompt: str) -> str:
        if self.template.image_token in prompt:
            raise LibrobotError(
                f"the instruction {prompt!r} holds {self.template.image_token!r}, which stands for a "
                f"picture; write the instruction without it"
            )
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if len(ids) <= self.max_prompt_tokens:
            return prompt
        kept = str(self.tokenizer.decode(ids[: self.max_prompt_tokens]))
        warnings.warn(
            f"an instruction may have vlm.max_prompt_tokens={self.max_prompt_tokens} tokens, found "
            f"{len(ids)}: everything after {kept!r} is cut",
            stacklevel=2,
        )
        return kept

    def _expand(
        self, ids: list[int], grids: list[tuple[int, tuple[int, int]]]
    ) -> tuple[list[int], list[int]]:
        """Every placeholder as its picture's tokens, and the camera of every token (0 for text)."""
        expanded: list[int] = []
        cameras: list[int] = []
        pictures = iter(grids)
        for token in ids:
            camera, piece = 0, [token]
            if token == self.image_token_id:
                camera, grid = next(pictures)
                piece = self._picture(*grid)
            expanded += piece
            cameras += [camera if part == self.image_token_id else 0 for part in piece]
        return expanded, cameras

    def _picture(self, rows: int, columns: int) -> list[int]:
        """Token ids of a picture with this grid."""
        return [self.image_token_id] * (rows * columns)


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of a special token. Raises LibrobotError where the tokenizer splits it into several."""
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise LibrobotError(
            f"the tokenizer has no token {token!r}: it is not this family's tokenizer; check vlm.checkpoint"
        )
    return ids[0]


def without_absent(
    inputs: Mapping[str, Tensor], present: Sequence[Bool[Tensor, " b"]]
) -> tuple[dict[str, Tensor], Bool[Tensor, "b l"]]:
    """The processor's tensors for the cameras that are `present`, and which tokens are then real.

    The placeholders of an absent camera stay, so that all rows keep one length, but nothing attends to them
    and the tokens behind them take their positions (as in openpi, whose positions count real tokens).
    """
    mask = inputs["attention_mask"]
    if not present:
        return dict(inputs), mask
    seen = torch.stack([torch.ones_like(present[0]), *present], dim=1).gather(1, inputs["camera"])
    shift = (inputs["advance"] * (mask & ~seen)).cumsum(dim=1)
    positions = inputs["position_ids"] - (shift if inputs["position_ids"].ndim == 2 else shift[:, None])
    moved = {"position_ids": positions, "next_position": inputs["next_position"] - shift[:, -1]}
    return {**inputs, **moved}, mask & seen
