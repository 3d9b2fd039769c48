"""SmolVLM2 as SmolVLA reads it (Shukor et al. 2025, arXiv 2506.01844; lerobot's `smolvla`).

tokens      the pictures', camera by camera, then the instruction and a newline: no marks, no conversation
pictures    scaled into the tower's square with their own aspect ratio, black on the left and on top
embeddings  of pictures and of text, times the square root of the width
positions   rotary with base 10,000, where SmolLM2 was trained with 100,000
attention   all of the prefix sees all of it (`prefix_attention: bidirectional`)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from librobot.nn.pictures import resize_with_pad
from librobot.vlms.smolvlm import IMAGE, SmolVLM2, SmolVLMProcessor, SmolVLMTemplate

ROPE_THETA = 10_000.0


class PlainTemplate(SmolVLMTemplate):
    """Pictures, instruction, one newline."""

    def text(self, prompt: str, num_pictures: int) -> str:
        return self.picture * num_pictures + prompt.removesuffix("\n") + self.tail


class PlainProcessor(SmolVLMProcessor):
    """Nothing stands around a picture's tokens."""

    def _picture(self, rows: int, columns: int) -> list[int]:
        return [self.image_token_id] * self.tokens_per_picture


class SmolVLABackbone(SmolVLM2):
    """The weights and parts of SmolVLM2; what enters the language model is SmolVLA's."""

    processor_class = PlainProcessor
    template = PlainTemplate(image_token=IMAGE, picture=IMAGE, tail="\n")
    takes_floats = True

    def assemble(self, *args: Any) -> None:
        super().assemble(*args)
        config = self.text_config
        config.rope_parameters = {**config.rope_parameters, "rope_theta": ROPE_THETA}
        text: Any = self.text
        text.rotary_emb = type(text.rotary_emb)(config=config)
        for module in (text.embed_tokens, self.model.model.connector):
            module.register_forward_hook(times_root_of_width)

    def picture_inputs(self, pictures: list[Tensor], batch_size: int) -> dict[str, Tensor]:
        side = self.model.config.vision_config.image_size
        floats = (p.float() / 255.0 if p.dtype == torch.uint8 else p for p in pictures)
        pixels = torch.stack([resize_with_pad(p, side, side, sides="left_top") for p in floats])
        pixels = pixels.unflatten(0, (batch_size, -1)) * 2.0 - 1.0
        # The model takes a picture of zeros for padding and drops it: an even grey must not be one.
        padding = (pixels == 0).flatten(2).all(dim=2)[..., None, None, None]
        return {"pixel_values": torch.where(padding, torch.full_like(pixels, 1e-6), pixels)}


def times_root_of_width(module: nn.Module, args: Any, embeddings: Tensor) -> Tensor:
    return embeddings * math.sqrt(embeddings.shape[-1])
