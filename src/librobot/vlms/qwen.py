"""Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL (arXiv 2511.21631).

Pictures of any size become as many tokens as they need (`pictures.size`: the fewest and the most pixels);
every token has a temporal, a vertical and a horizontal position (M-RoPE).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor, smart_resize

from librobot.vlms.packed import PackedSamples
from librobot.vlms.pretrained import PretrainedVLM
from librobot.vlms.prompts import PromptProcessor, Template

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
TURN = "<|im_end|>\n<|im_start|>assistant\n"


class QwenProcessor(PromptProcessor):
    """Prompts for Qwen's models: the grid of a picture follows from its size."""

    def __init__(self, *args: Any, picture_processor: Qwen2VLImageProcessor, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.factor = picture_processor.patch_size * picture_processor.merge_size
        self.min_pixels = picture_processor.size["shortest_edge"]
        self.max_pixels = picture_processor.size["longest_edge"]

    def picture_grid(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)
        return rows // self.factor, columns // self.factor

    def positions(
        self, camera: Int[Tensor, "b l"], grids: list[tuple[int, int]]
    ) -> tuple[Int[Tensor, "b three l"], Int[Tensor, "b l"]]:
        """Text counts on all three axes; a picture's tokens count rows and columns from where it starts, and
        the text after it goes on behind the longer side (Qwen2-VL, section 2.1)."""
        visual = camera[0] > 0  # template and pictures stand before the instruction: the same in all rows
        running = torch.zeros(3, camera.shape[1], dtype=torch.long)
        advance = torch.ones(camera.shape[1], dtype=torch.long)
        place, start, pictures = 0, 0, iter(grids)
        while place < camera.shape[1]:
            if not visual[place]:
                running[:, place] = start
                place, start = place + 1, start + 1
                continue
            rows, columns = next(pictures)
            here = slice(place, place + rows * columns)
            running[0, here] = start
            running[1, here] = start + torch.arange(rows).repeat_interleave(columns)
            running[2, here] = start + torch.arange(columns).repeat(rows)
            advance[here] = 0
            advance[place] = max(rows, columns)
            place, start = place + rows * columns, start + max(rows, columns)
        return running.expand(len(camera), -1, -1).contiguous(), advance.expand_as(camera).contiguous()


class Qwen(PretrainedVLM):
    """What the three generations share."""

    picture_processor_class = Qwen2VLImageProcessor
    processor_class = QwenProcessor
    special_tokens: ClassVar[dict[str, str]] = {
        "pad_token_id": "<|endoftext|>",
        "eos_token_id": "<|im_end|>",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    parts: ClassVar[dict[str, tuple[str, ...]]] = {
        "vision": ("model.visual",),
        "projector": ("model.visual.merger", "model.visual.deepstack_merger_list"),
        "language": ("model.language_model", "lm_head"),
        "embeddings": ("model.language_model.embed_tokens",),
    }

    @property
    def vision_blocks(self) -> nn.ModuleList:
        return self.model.model.visual.blocks

    @classmethod
    def plain_specials(cls) -> list[str]:
        return ["<|im_start|>"]

    @classmethod
    def default_picture_processor(cls, config: PreTrainedConfig) -> Qwen2VLImageProcessor:
        vision = config.vision_config
        return Qwen2VLImageProcessor(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
        )

    def processor_options(self) -> dict[str, Any]:
        return {"picture_processor": self.picture_processor}

    def model_positions(self, positions: Tensor) -> Tensor:
        return positions.transpose(0, 1)

    def text_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (inputs["camera"] > 0).int()}


class Qwen2VL(Qwen):
    model_class: ClassVar[type[PreTrainedModel]] = Qwen2VLForConditionalGeneration
    config_class: ClassVar[type[PreTrainedConfig]] = Qwen2VLConfig
    template = Template(
        image_token="<|image_pad|>",
        head="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        picture=PICTURE,
        tail=TURN,
    )


class Qwen25VL(Qwen2VL):
    model_class = Qwen2_5_VLForConditionalGeneration
    config_class = Qwen2_5_VLConfig


class Qwen3VL(Qwen):
    """Features of several vision layers are added to the first layers' hidden states (DeepStack).

    A hidden state of `layers` is a block's output, before these features are added (as in transformers).
    """

    model_class = Qwen3VLForConditionalGeneration
    config_class = Qwen3VLConfig
    template = Template(image_token="<|image_pad|>", head="<|im_start|>user\n", picture=PICTURE, tail=TURN)

    def packed_inputs(self, given: dict[str, Any], samples: PackedSamples) -> dict[str, Any]:
        """DeepStack's features are those of picture tokens, in the order of the rows."""
        seen, mask, packing = given["visual_pos_masks"], samples.mask, samples.packing
        if seen is None:
            return given
        kept = samples.join(seen & mask, torch.zeros_like(samples.real)) & (packing.sample >= 0)
        features = []
        for feature in given["deepstack_visual_embeds"]:
            padded = feature.new_zeros(*seen.shape, feature.shape[-1])
            padded = padded.masked_scatter(seen[..., None], feature)
            nothing = feature.new_zeros(*samples.real.shape, feature.shape[-1])
            features.append(samples.join(padded, nothing)[kept])
        return {**given, "visual_pos_masks": kept, "deepstack_visual_embeds": features}

    @classmethod
    def default_picture_processor(cls, config: PreTrainedConfig) -> Qwen2VLImageProcessor:
        made = super().default_picture_processor(config)
        made.image_mean = made.image_std = [0.5, 0.5, 0.5]
        made.size = {"shortest_edge": 65536, "longest_edge": 16777216}
        return made


class CosmosReason2(Qwen3VL):
    """Qwen3-VL as GR00T N1.7 asks it: the user's turn alone, without the opening of an answer."""

    template = Template(
        image_token="<|image_pad|>", head="<|im_start|>user\n", picture=PICTURE, tail="<|im_end|>\n"
    )
