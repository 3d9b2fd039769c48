"""PaliGemma (arXiv 2407.07726) and PaliGemma 2 (arXiv 2412.03555): SigLIP in front of Gemma or Gemma 2.

All tokens of the prefix (pictures and instruction) attend to each other; only an answer is causal.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import (
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedConfig,
    SiglipImageProcessor,
)

from librobot.vlms.checks import as_uint8
from librobot.vlms.pretrained import PretrainedVLM
from librobot.vlms.prompts import PromptProcessor, Template


class PaliGemmaProcessor(PromptProcessor):
    """Prompts for PaliGemma, whose first token has position 1."""

    first_position = 1


class PaliGemma(PretrainedVLM):
    """Both generations.

    Gemma 2 (section 2 of arXiv 2408.00118) caps its attention logits. transformers' sdpa attention leaves
    that out; eager, flex_attention and flash_attention_2 have it.
    """

    model_class = PaliGemmaForConditionalGeneration
    config_class = PaliGemmaConfig
    picture_processor_class = SiglipImageProcessor
    processor_class = PaliGemmaProcessor
    natural_attention = "bidirectional"
    takes_floats = True
    can_stop = True
    template = Template(image_token="<image>", picture="<image>", lead="<bos>", tail="\n")
    special_tokens: ClassVar[dict[str, str]] = {
        "pad_token_id": "<pad>",
        "eos_token_id": "<eos>",
        "bos_token_id": "<bos>",
        "image_token_id": "<image>",
    }

    @property
    def vision_blocks(self) -> nn.ModuleList:
        return self.model.model.vision_tower.vision_model.encoder.layers

    @classmethod
    def default_picture_processor(cls, config: PreTrainedConfig) -> SiglipImageProcessor:
        side = config.vision_config.image_size
        return SiglipImageProcessor(size={"height": side, "width": side})

    def picture_inputs(self, pictures: list[Tensor], batch_size: int) -> dict[str, Tensor]:
        """Pictures of the model's own size are only shifted and scaled, floats without a rounding."""
        side = self.model.config.vision_config.image_size
        if any(picture.shape[-2:] != (side, side) for picture in pictures):
            return super().picture_inputs([as_uint8(picture) for picture in pictures], batch_size)
        pixels = torch.stack([p / 255.0 if p.dtype == torch.uint8 else p for p in pictures])
        shown: Any = self.picture_processor
        mean, std = (pixels.new_tensor(v)[:, None, None] for v in (shown.image_mean, shown.image_std))
        return {"pixel_values": (pixels - mean) / std}

    def tokens_per_picture(self) -> int:
        vision = self.model.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    def set_causal(self, causal: bool) -> None:
        """The mask follows `token_type_ids` (see `text_inputs`); flash attention follows this switch."""
        for block in self.blocks:
            attention: Any = block.self_attn
            attention.is_causal = causal

    def prefix_mask(self, mask: Bool[Tensor, "b l"]) -> Tensor:
        """Gemma takes the mask of a bidirectional prefix as what is added to the scores, which spares it the
        making (a millisecond); other attention and Gemma 2's windows want to know the real tokens."""
        kind = self.text_config._attn_implementation
        if self.causal or self.text_config.model_type != "gemma" or kind not in ("sdpa", "eager"):
            return mask
        dtype = self.model.get_input_embeddings().weight.dtype
        hidden = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
        return hidden[:, None, None].expand(-1, 1, mask.shape[1], -1)

    def text_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Type 0 is the prefix, in which all tokens attend to each other; type 1 is causal."""
        return {"token_type_ids": torch.full_like(inputs["input_ids"], int(self.causal))}

    def never_used(self) -> list[nn.Module]:
        vision = self.model.model.vision_tower.vision_model
        return super().never_used() + ([vision.head] if vision.use_head else [])

    def assemble(self, *args: Any) -> None:
        super().assemble(*args)
        if (
            getattr(self.text_config, "attn_logit_softcapping", None)
            and self.text_config._attn_implementation == "sdpa"
        ):
            warnings.warn(
                "vlm.attn_implementation=sdpa does not cap the attention logits, as this language model "
                "(Gemma 2) does: its outputs differ from the published model's; take eager, "
                "flex_attention or flash_attention_2",
                stacklevel=2,
            )
