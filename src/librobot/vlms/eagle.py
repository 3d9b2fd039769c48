"""Eagle 2.5 (arXiv 2504.15271) as in GR00T N1.5, and Eagle-Block2A as in N1.6: SigLIP 2 and Qwen3, with one
linear map between them (2.5), or a norm and an MLP over squares of 2 x 2 patches (Block2A).

transformers has no such models; these are its LLaVA with Eagle's projectors and Eagle's features, which have
passed the vision tower's last norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from einops import rearrange
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
        width = config.get_text_config().hidden_size
        self.model.multi_modal_projector = self.projector(vision.hidden_size, width)
        self.model.get_image_features = self.features

    @staticmethod
    def projector(seen: int, width: int) -> nn.Module:
        """From the vision tower's width to the language model's."""
        return nn.Linear(seen, width)

    def features(self, pixel_values: Tensor, **ignored: Any) -> BaseModelOutputWithPooling:
        seen = self.model.vision_tower(pixel_values, return_dict=True)
        seen.pooler_output = list(self.model.multi_modal_projector(seen.last_hidden_state))
        return seen


class Block2AModel(EagleModel):
    """Four neighbouring patches become one token."""

    @staticmethod
    def projector(seen: int, width: int) -> nn.Module:
        return nn.Sequential(
            nn.LayerNorm(4 * seen), nn.Linear(4 * seen, width), nn.GELU(), nn.Linear(width, width)
        )

    def features(self, pixel_values: Tensor, **ignored: Any) -> BaseModelOutputWithPooling:
        seen = self.model.vision_tower(pixel_values, return_dict=True)
        rows = round(seen.last_hidden_state.shape[1] ** 0.5) // 2
        squares = rearrange(
            seen.last_hidden_state, "n (h i w j) d -> n (h w) (d i j)", h=rows, w=rows, i=2, j=2
        )
        seen.pooler_output = list(self.model.multi_modal_projector(squares))
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


class EagleBlock2A(Eagle25):
    """A picture of 16 x 16 patches has 64 tokens."""

    model_class = Block2AModel

    def assemble(self, *args: Any) -> None:
        super().assemble(*args)
        vision = self.model.config.vision_config
        if vision.image_size % (2 * vision.patch_size):
            raise ValueError(
                f"config.vision_config.image_size must be a multiple of {2 * vision.patch_size}, twice the "
                f"patch_size, found {vision.image_size}"
            )

    def tokens_per_picture(self) -> int:
        return super().tokens_per_picture() // 4
