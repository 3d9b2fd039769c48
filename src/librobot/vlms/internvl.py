"""InternVL2 (Mini-InternVL, arXiv 2410.16261) and InternVL3 (arXiv 2504.10479).

InternViT reads tiles of 448 pixels; a pixel shuffle joins each 2 x 2 patches, which leaves 256 tokens a tile.
A picture is one tile, or with `pictures.crop_to_patches` the grid of up to `pictures.max_patches` tiles whose
shape is nearest to the picture's, and the whole picture once more.

A checkpoint is transformers' own (`...-hf`), or in the layout of the first publication (see
`internvl2_weights`).
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.got_ocr2.image_processing_got_ocr2 import (
    GotOcr2ImageProcessor,
    get_optimal_tiled_canvas,
)

from librobot.errors import LibrobotError
from librobot.vlms.internvl2_weights import (
    convert_config,
    load_weights,
    picture_size,
    published_config,
    published_tokenizer,
)
from librobot.vlms.loading import read_json
from librobot.vlms.pretrained import PretrainedVLM
from librobot.vlms.prompts import PromptProcessor, Template

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PICTURE = "<img><IMG_CONTEXT></img>\n"


class InternVLProcessor(PromptProcessor):
    """Prompts for InternVL: with tiling, the number of a picture's tokens follows from its size."""

    def __init__(self, *args: Any, picture_processor: GotOcr2ImageProcessor, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tiles = bool(picture_processor.crop_to_patches)
        self.tile_size = (picture_processor.size["height"], picture_processor.size["width"])
        self.min_tiles = picture_processor.min_patches
        self.max_tiles = picture_processor.max_patches

    def picture_grid(self, height: int, width: int) -> tuple[int, int]:
        """Tiles (the whole picture among them), and tokens of a tile."""
        if not self.tiles:
            return 1, self.tokens_per_picture
        columns, rows = get_optimal_tiled_canvas(
            (height, width), self.tile_size, self.min_tiles, self.max_tiles
        )
        count = rows * columns
        return (count if count == 1 else count + 1), self.tokens_per_picture


class InternVL(PretrainedVLM):
    """What the generations share; a subclass names its language model and its prompt."""

    text_type: ClassVar[str]
    """`model_type` of the language model."""
    picture_processor: GotOcr2ImageProcessor

    model_class = InternVLForConditionalGeneration
    config_class = InternVLConfig
    picture_processor_class = GotOcr2ImageProcessor
    processor_class = InternVLProcessor

    @property
    def vision_blocks(self) -> nn.ModuleList:
        return self.model.model.vision_tower.encoder.layer

    @classmethod
    def default_picture_processor(cls, config: PreTrainedConfig) -> GotOcr2ImageProcessor:
        height, width = config.vision_config.image_size
        return GotOcr2ImageProcessor(size={"height": height, "width": width}, **IMAGENET)

    def processor_options(self) -> dict[str, Any]:
        return {"picture_processor": self.picture_processor}

    def tokens_per_picture(self) -> int:
        """Tokens of a tile."""
        height, width = self.picture_processor.size["height"], self.picture_processor.size["width"]
        factor = round(self.model.config.vision_config.patch_size[0] / self.model.config.downsample_ratio)
        if height != width or height % factor:
            raise ValueError(
                f"pictures.size: a tile must be a square whose side is a multiple of {factor} pixels, found "
                f"{height} x {width}"
            )
        return (height // factor) ** 2

    def picture_inputs(self, pictures: list[Tensor], batch_size: int) -> dict[str, Tensor]:
        return {"pixel_values": super().picture_inputs(pictures, batch_size)["pixel_values"]}

    def read_config(self, checkpoint: str) -> PreTrainedConfig:
        published = published_config(checkpoint)
        if published is not None:
            config: PreTrainedConfig = convert_config(checkpoint, published)
        else:
            config = super().read_config(checkpoint)
            if "tie_word_embeddings" not in read_json(checkpoint, "config.json"):
                # Files written before transformers 5 leave it to the language model's configuration.
                config.tie_word_embeddings = config.text_config.tie_word_embeddings
        if config.text_config.model_type != self.text_type:
            raise LibrobotError(
                f"vlm.checkpoint={checkpoint}: its language model is of type "
                f"{config.text_config.model_type}, this option of vlm= reads {self.text_type}; internvl2 and "
                f"internvl2_8b read llama (InternLM2), internvl3 and internvl3_8b read qwen2"
            )
        return config

    def load_model(
        self, checkpoint: str, config: PreTrainedConfig, options: dict[str, Any]
    ) -> PreTrainedModel:
        if published_config(checkpoint) is None:
            return super().load_model(checkpoint, config, options)
        with no_init_weights():
            model = self._from_config(config, options)
        model.tie_weights()
        load_weights(model, checkpoint)
        return model.eval()

    def read_parts(self, checkpoint: str, pictures: dict[str, Any]) -> None:
        published = published_config(checkpoint)
        if published is None:
            super().read_parts(checkpoint, pictures)
            return
        self.tokenizer = published_tokenizer(checkpoint)
        side = picture_size(published)
        made = {"size": {"height": side, "width": side}, **IMAGENET}
        self.picture_processor = GotOcr2ImageProcessor(**(made | pictures))

    @classmethod
    def plain_specials(cls) -> list[str]:
        return ["<|im_start|>", "<img>", "</img>"]


class InternVL2(InternVL):
    """InternVL2 2B and 8B: InternLM2 as the language model, read as a Llama.

    The prompt is that of the published conversation template "internlm2-chat": turns follow each other
    without a line break.
    """

    text_type = "llama"
    special_tokens: ClassVar = {
        "image_token_id": "<IMG_CONTEXT>",
        "pad_token_id": "</s>",
        "eos_token_id": "<|im_end|>",
    }
    template = Template(
        image_token="<IMG_CONTEXT>",
        head="<s><|im_start|>system\n"
        "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
        "英文名叫InternVL, 是一个有用无害的人工智能助手。"
        "<|im_end|><|im_start|>user\n",
        picture=PICTURE,
        tail="<|im_end|><|im_start|>assistant\n",
    )

    @classmethod
    def plain_specials(cls) -> list[str]:
        return [*super().plain_specials(), "<s>"]


class InternVL3(InternVL):
    """InternVL3 2B and 8B: Qwen2.5 as the language model.

    The prompt is that of the published conversation template "internvl2_5".
    """

    text_type = "qwen2"
    special_tokens: ClassVar = {
        "image_token_id": "<IMG_CONTEXT>",
        "pad_token_id": "<|endoftext|>",
        "eos_token_id": "<|im_end|>",
    }
    template = Template(
        image_token="<IMG_CONTEXT>",
        head="<|im_start|>system\n"
        "你是书生·万象，英文名是InternVL，"
        "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
        "<|im_end|>\n<|im_start|>user\n",
        picture=PICTURE,
        tail="<|im_end|>\n<|im_start|>assistant\n",
    )
