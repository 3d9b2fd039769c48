"""Eagle 2.5 (arXiv 2504.15271) as in GR00T N1.5: SigLIP 2, one linear map and Qwen3.

transformers has no such model; this is its LLaVA with Eagle's projector and Eagle's features, which have
passed the vision tower's last norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor

from librobot.vlms.pretrained import PretrainedVLM
from librobot.vlms.prompts import Template


class EagleModel(LlavaForConditionalGeneration):
    """The language model and the vision tower have LLaVA's names, so that all else is LLaVA's, too."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        vision: Any = config.vision_config
        self.model.multi_modal_projector = nn.Linear(vision.hidden_size, config.get_text_config().hidden_size)
        self.model.get_image_features = self.features

    def features(self, pixel_values: Tensor, **ignored: Any) -> BaseModelOutputWithPooling:
        seen = self.model.vision_tower(pixel_values, return_dict=True)
        seen.pooler_output = list(self.model.multi_modal_projector(seen.last_hidden_state))
        return seen


@dataclass(frozen=True)
class NumberedPictures(Template):
    """Pictures are numbered from 1: `picture` holds a # in place of its number."""

    def text(self, prompt: str, num_pictures: int) -> str:
        numbered = "".join(self.picture.replace("#", str(i + 1)) for i in range(num_pictures))
        return self.head + numbered + self.lead + prompt + self.tail


class Eagle25(PretrainedVLM):
    """Pictures of one size; no tiles, as GR00T uses none."""

    model_class = EagleModel
    config_class = LlavaConfig
    picture_processor_class = SiglipImageProcessor
    template = NumberedPictures(
        image_token="<IMG_CONTEXT>",
        head="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        picture="<image #><img><IMG_CONTEXT></img>",
        tail="<|im_end|>\n<|im_start|>assistant\n",
    )
    special_tokens: ClassVar[dict[str, str]] = {
        "pad_token_id": "<|endoftext|>",
        "eos_token_id": "<|im_end|>",
        "image_token_id": "<IMG_CONTEXT>",
    }

    @classmethod
    def plain_specials(cls) -> list[str]:
        return ["<|im_start|>", "<img>", "</img>"]

    @property
    def vision_blocks(self) -> nn.ModuleList:
        return self.model.model.vision_tower.vision_model.encoder.layers

    @classmethod
    def default_picture_processor(cls, config: PreTrainedConfig) -> SiglipImageProcessor:
        side = config.vision_config.image_size
        half = [0.5, 0.5, 0.5]
        return SiglipImageProcessor(size={"height": side, "width": side}, image_mean=half, image_std=half)

    def never_used(self) -> list[nn.Module]:
        """Also the vision tower's pooling."""
        return [*super().never_used(), self.model.model.vision_tower.vision_model.head]

    def tokens_per_picture(self) -> int:
        vision = self.model.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2
