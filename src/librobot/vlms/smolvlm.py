"""SmolVLM2 (arXiv 2504.05299): SigLIP, pixel shuffle and SmolLM2; SmolVLA's backbone is the 500M one.

A picture becomes one square of `max_image_size`, or with `pictures.do_image_splitting` also the tiles of an
enlarged copy (`pictures.size.longest_edge`), each with as many tokens as a whole picture.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.smolvlm.image_processing_smolvlm import (
    SmolVLMImageProcessor,
    get_resize_output_image_size,
)

from librobot.vlms.pretrained import PretrainedVLM
from librobot.vlms.prompts import PromptProcessor, Template

AROUND = "<fake_token_around_image>"
WHOLE = "<global-img>"
IMAGE = "<image>"
MAX_TILES = 6  # rows and columns that have a token of their own


class SmolVLMTemplate(Template):
    """A turn that starts with a picture has no space behind the colon."""

    def text(self, prompt: str, num_pictures: int) -> str:
        return super().text(prompt if num_pictures else f" {prompt}", num_pictures)


class SmolVLMProcessor(PromptProcessor):
    """Prompts for SmolVLM2: marks around every picture, and a row and column in front of every tile."""

    def __init__(self, *args: Any, picture_processor: SmolVLMImageProcessor, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tile = picture_processor.max_image_size["longest_edge"]
        self.longest_edge = picture_processor.size["longest_edge"]
        self.splits = picture_processor.do_image_splitting
        self.pieces: dict[tuple[int, int], list[int]] = {}

    def picture_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles beside the whole picture; (0, 0) where it is not split."""
        if not self.splits:
            return 0, 0
        image = torch.empty(height, width, device="meta")
        height, width = get_resize_output_image_size(image, self.longest_edge)
        long = math.ceil(max(height, width) / self.tile) * self.tile
        ratio = width / height
        short = int(long / ratio if width >= height else long * ratio)
        tiles = long // self.tile, math.ceil(short / self.tile)
        rows, columns = tiles[::-1] if width >= height else tiles
        return (0, 0) if rows == columns == 1 else (rows, columns)

    def _picture(self, rows: int, columns: int) -> list[int]:
        """Token ids of a picture of so many tiles, and of the whole of it."""
        if (rows, columns) not in self.pieces:
            places = IMAGE * self.tokens_per_picture
            text = ""
            for row in range(1, rows + 1):
                for column in range(1, columns + 1):
                    text += f"{AROUND}<row_{row}_col_{column}>{places}"
                text += "\n"
            text += ("\n" if rows else "") + AROUND + WHOLE + places + AROUND
            self.pieces[rows, columns] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.pieces[rows, columns]


class SmolVLM2(PretrainedVLM):
    """SmolVLM2's three sizes; their pictures are resized on the device they come on."""

    picture_processor: SmolVLMImageProcessor
    model_class = SmolVLMForConditionalGeneration
    config_class = SmolVLMConfig
    picture_processor_class = SmolVLMImageProcessor
    processor_class = SmolVLMProcessor
    template = SmolVLMTemplate(
        image_token=IMAGE,
        head="<|im_start|>User:",
        picture=IMAGE,  # the processor writes what stands around it
        tail="<end_of_utterance>\nAssistant:",
    )
    special_tokens: ClassVar[dict[str, str]] = {
        "pad_token_id": "<|im_end|>",
        "bos_token_id": "<|im_start|>",
        "eos_token_id": "<end_of_utterance>",
        "image_token_id": IMAGE,
    }
    parts: ClassVar[dict[str, tuple[str, ...]]] = {
        "vision": ("model.vision_model",),
        "projector": ("model.connector",),
        "language": ("model.text_model", "lm_head"),
        "embeddings": ("model.text_model.embed_tokens",),
    }

    @property
    def text(self) -> nn.Module:
        return self.model.model.text_model

    @property
    def vision_blocks(self) -> nn.ModuleList:
        return self.model.model.vision_model.encoder.layers

    @classmethod
    def plain_specials(cls) -> list[str]:
        numbers = range(1, MAX_TILES + 1)
        return [AROUND, WHOLE, *(f"<row_{row}_col_{column}>" for row in numbers for column in numbers)]

    @classmethod
    def default_picture_processor(cls, config: PreTrainedConfig) -> SmolVLMImageProcessor:
        side = {"longest_edge": config.vision_config.image_size}
        return SmolVLMImageProcessor(size=side, max_image_size=side, do_image_splitting=False)

    def processor_options(self) -> dict[str, Any]:
        return {"picture_processor": self.picture_processor}

    def tokens_per_picture(self) -> int:
        return self.model.model.image_seq_len

    def picture_inputs(self, pictures: list[Tensor], batch_size: int) -> dict[str, Tensor]:
        count = len(pictures) // batch_size
        samples: Any = [pictures[start : start + count] for start in range(0, len(pictures), count)]
        made = self.picture_processor(images=samples, return_tensors="pt")
        pixels = made["pixel_values"].to(pictures[0].device)
        # The model takes a picture of zeros for padding and drops it: an even grey must not be one.
        padding = (pixels == 0).flatten(2).all(dim=2)[..., None, None, None]
        return {"pixel_values": torch.where(padding, torch.full_like(pixels, 1e-6), pixels)}
