"""Prismatic (arXiv 2402.07865), OpenVLA's backbone: DINOv2 and SigLIP side by side, a projector, Llama 2.

The pictures' patches stand behind the start token, the prompt behind them, without a conversation around it.
transformers has no such model; this one is its LLaVA with other eyes. `checkpoint` is also a published
OpenVLA folder or hub name (config.json of type "openvla" or "prismatic").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipImageProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from librobot.errors import LibrobotError
from librobot.types import Observation
from librobot.vlms.llava import START, LlavaProcessor
from librobot.vlms.loading import hub_errors, load_config, load_tokenizer, read_json
from librobot.vlms.pretrained import PretrainedVLM
from librobot.vlms.prismatic_vision import FusedVision, Projector
from librobot.vlms.prompts import Template

IMAGE = "<image>"
PUBLISHED = ("openvla", "prismatic")
DINO = {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "mlp_width": 4096}
DINO |= {"num_registers": 4, "layer_scale": True}
SIGLIP = {"hidden_size": 1152, "num_layers": 27, "num_heads": 16, "mlp_width": 4304}


class PrismaticVisionConfig(PreTrainedConfig):
    model_type = "librobot_prismatic_vision"

    image_size: int = 224
    patch_size: int = 14
    dino: dict | None = None
    siglip: dict | None = None
    film: bool = False


class PrismaticConfig(LlavaConfig):
    model_type = "librobot_prismatic"
    sub_configs: ClassVar[dict] = {"text_config": AutoConfig, "vision_config": PrismaticVisionConfig}

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.vision_config, dict):
            self.vision_config = PrismaticVisionConfig(**self.vision_config)
        super().__post_init__(**kwargs)


class PrismaticModel(LlavaModel):
    """LLaVA's forward over other features."""

    config_class = PrismaticConfig

    def __init__(self, config: PrismaticConfig) -> None:
        PreTrainedModel.__init__(self, config)
        vision: Any = config.vision_config
        text: Any = config.text_config
        self.vision_tower = FusedVision(vision, text.hidden_size if vision.film else None)
        width = vision.dino["hidden_size"] + vision.siglip["hidden_size"]
        self.multi_modal_projector: Any = Projector(width, text.hidden_size)
        self.language_model = AutoModel.from_config(text)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **options: Any) -> BaseModelOutputWithPooling:
        features = self.multi_modal_projector(self.vision_tower(pixel_values))
        return BaseModelOutputWithPooling(pooler_output=tuple(features))  # type: ignore[arg-type]


class PrismaticForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = PrismaticConfig

    def __init__(self, config: PrismaticConfig) -> None:
        PreTrainedModel.__init__(self, config)
        text: Any = config.text_config
        self.model = PrismaticModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


class PrismaticProcessor(LlavaProcessor):
    """The prompt is tokenised alone, as the published model saw it: no picture's token stands before it."""

    def _encode(self, prompt: str, num_pictures: int) -> list[int]:
        words = self.tokenizer(self._cut(prompt), add_special_tokens=False)["input_ids"]
        return [self.start, *[self.image_token_id] * num_pictures, *words]


class Prismatic(PretrainedVLM):
    """`film` (OpenVLA-OFT+) lets the prompt modulate every layer of both vision transformers."""

    model_class = PrismaticForConditionalGeneration
    config_class = PrismaticConfig
    picture_processor_class = SiglipImageProcessor
    processor_class = PrismaticProcessor
    template = Template(image_token=IMAGE, picture=IMAGE)
    special_tokens: ClassVar[dict[str, str]] = {
        "pad_token_id": "<pad>",
        "bos_token_id": START,
        "eos_token_id": "</s>",
        "image_token_id": IMAGE,
    }

    def __init__(self, *, film: bool = False, **options: Any) -> None:
        self._film = film
        super().__init__(**options)

    @property
    def vision_blocks(self) -> nn.ModuleList:
        return self.model.model.vision_tower.blocks

    @classmethod
    def default_picture_processor(cls, config: PreTrainedConfig) -> SiglipImageProcessor:
        """Squeezed into a square; the vision transformers normalise for themselves."""
        side = config.vision_config.image_size
        return SiglipImageProcessor(size={"height": side, "width": side}, do_normalize=False, resample=3)

    def tokens_per_picture(self) -> int:
        vision = self.model.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    def forward(self, observation: Observation, **options: Any) -> Any:
        self._tell(observation)
        return super().forward(observation, **options)

    def read_packed(self, observation: Observation, *given: Any, **options: Any) -> Any:
        self._tell(observation)
        return super().read_packed(observation, *given, **options)

    def embed_prefix(
        self, observation: Observation
    ) -> tuple[Float[Tensor, "b l d"], Bool[Tensor, "b l"], int]:
        """What the language model reads: start, pictures, prompt; which are real; where pictures end."""
        inputs, mask = self._inputs(observation)
        x = self.embed_tokens(inputs["input_ids"])
        seen = inputs["camera"] > 0
        if observation.images:
            self._tell(observation)
            features = self.model.model.get_image_features(**self._pictures(observation)).pooler_output
            x = x.masked_scatter(seen[..., None], torch.cat(features).to(x))
        return x, mask, 1 + int(seen[0].sum())

    def _tell(self, observation: Observation) -> None:
        """Give FiLM the mean embedding of the prompt, with the boundary and the end that follow it."""
        if not self.model.config.vision_config.film or not observation.images:
            return
        inputs, _ = self._inputs(observation)
        words = (inputs["camera"] == 0) & inputs["attention_mask"]
        x = self.embed_tokens(inputs["input_ids"]) * words[..., None]
        after = torch.tensor([[self.vocabulary.space, self.vocabulary.end]], device=x.device)
        total = x.sum(dim=1) + self.embed_tokens(after).sum(dim=1)
        mean = total / (words.sum(dim=1, keepdim=True) + 2)
        per_sample = sum(image.shape[1] for image in observation.images.values())
        self.model.model.vision_tower.language = mean.repeat_interleave(per_sample, dim=0)

    # Where its parts come from.

    def assemble(self, checkpoint: str | None, pretrained: bool, config: Any, *rest: Any) -> None:
        if config is not None:
            vision = {**config["vision_config"], "film": self._film}
            config = {**config, "vision_config": vision}
        super().assemble(checkpoint, pretrained, config, *rest)

    def read_config(self, checkpoint: str) -> PreTrainedConfig:
        with hub_errors(checkpoint):
            found = read_json(checkpoint, "config.json")
        kind = found.get("model_type")
        if kind is None:  # no file, or no model's: transformers says which, and hub_errors what to do
            return load_config(checkpoint, PrismaticConfig)
        if kind in PUBLISHED:
            return convert_config(checkpoint, found, self._film)
        if kind != PrismaticConfig.model_type:
            raise LibrobotError(
                f"vlm.checkpoint={checkpoint} holds a {kind} model, this option of vlm= reads openvla and "
                f"prismatic; choose the vlm= option of that family, or another checkpoint"
            )
        return PrismaticConfig.from_pretrained(checkpoint)

    def read_parts(self, checkpoint: str, pictures: dict[str, Any]) -> None:
        found = read_json(checkpoint, "config.json")
        if found.get("model_type") not in PUBLISHED:
            super().read_parts(checkpoint, pictures)
            return
        self.tokenizer = load_tokenizer(checkpoint)
        self.tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
        made = self.default_picture_processor(convert_config(checkpoint, found, self._film))
        for name, value in pictures.items():
            setattr(made, name, value)
        self.picture_processor = made

    def load_model(
        self, checkpoint: str, config: PreTrainedConfig, options: dict[str, Any]
    ) -> PreTrainedModel:
        if read_json(checkpoint, "config.json").get("model_type") not in PUBLISHED:
            return super().load_model(checkpoint, config, options)
        raise LibrobotError(
            f"vlm.checkpoint={checkpoint}: published OpenVLA weights come with librobot-import, which makes "
            f"a policy of them; to train from them, start from that checkpoint"
        )


def convert_config(checkpoint: str, published: Mapping[str, Any], film: bool = False) -> PrismaticConfig:
    """Of a published config.json. Raises LibrobotError for other eyes than DINOv2 and SigLIP at 224."""
    if published.get("vision_backbone_id") != "dinosiglip-vit-so-224px":
        raise LibrobotError(
            f"{checkpoint}: vision_backbone_id must be dinosiglip-vit-so-224px, found "
            f"{published.get('vision_backbone_id')!r}"
        )
    text = {"model_type": "llama", "vocab_size": 32_064, "rms_norm_eps": 1e-6, "pad_token_id": 32_000}
    made: Any = PrismaticConfig  # transformers declares its arguments by annotations that mypy does not see
    return made(
        text_config={**text, **published.get("text_config", {})},
        vision_config={
            "image_size": published.get("image_sizes", [224])[0],
            "dino": {**DINO, **published.get("dino", {})},
            "siglip": {**SIGLIP, **published.get("siglip", {})},
            "film": film,
        },
        image_token_index=32_001,
        tie_word_embeddings=False,
    )
