"""LLaVA-1.5 (arXiv 2310.03744): CLIP ViT-L/336, a two-layer projector and Vicuna.

The features are those in front of CLIP's last layer (`vision_feature_layer: -2`), without its class token.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig

from librobot.vlms.pretrained import PretrainedVLM
from librobot.vlms.prompts import PromptProcessor, Template, token_id

START = "<s>"


class LlavaProcessor(PromptProcessor):
    """Prompts for LLaVA.

    The start token is put in front of the token ids and not of the text: SentencePiece marks the start of a
    text with a space, which a text that starts with a special token would not get everywhere.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.start = token_id(self.tokenizer, START)

    def _encode(self, prompt: str, num_pictures: int) -> list[int]:
        return [self.start, *super()._encode(prompt, num_pictures)]


class Llava(PretrainedVLM):
    """Vicuna's conversation without a system message, as the published chat template writes it."""

    model_class = LlavaForConditionalGeneration
    config_class = LlavaConfig
    picture_processor_class = CLIPImageProcessor
    processor_class = LlavaProcessor
    template = Template(image_token="<image>", head="USER: ", picture="<image>\n", tail=" ASSISTANT:")
    special_tokens: ClassVar[dict[str, str]] = {
        "pad_token_id": "<pad>",
        "bos_token_id": START,
        "eos_token_id": "</s>",
        "image_token_id": "<image>",
    }

    @property
    def vision_blocks(self) -> nn.ModuleList:
        return self.model.model.vision_tower.vision_model.encoder.layers

    @classmethod
    def default_picture_processor(cls, config: PreTrainedConfig) -> CLIPImageProcessor:
        side = config.vision_config.image_size
        return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    def tokens_per_picture(self) -> int:
        config = self.model.config
        patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        return patches + (config.vision_feature_select_strategy == "full")

    def never_used(self) -> list[nn.Module]:
        """Also CLIP's final norm and the layers behind the last one whose output is read."""
        vision = self.model.model.vision_tower.vision_model
        count = len(self.vision_blocks) + 1
        read = self.model.config.vision_feature_layer
        last = max(layer % count for layer in ([read] if isinstance(read, int) else read))
        return [*super().never_used(), vision.post_layernorm, *self.vision_blocks[last:]]
