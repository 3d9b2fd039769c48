"""Florence-2 (arXiv 2311.06242): DaViT in front of BART's encoder and decoder.

Its `Context` is what the encoder makes of pictures and instruction; there is no cache, and the decoder runs
for `generate` only. The model was trained on tasks in plain words ("What does the image describe?", "Locate
the phrases in the caption: a red cube"); transformers' task tokens (<CAPTION>) are short for them and are not
translated here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    PreTrainedConfig,
)
from transformers.modeling_outputs import BaseModelOutput

from librobot.errors import LibrobotError
from librobot.types import Observation
from librobot.vlms.base import Context, Geometry
from librobot.vlms.loading import hub_errors
from librobot.vlms.pretrained import PretrainedVLM
from librobot.vlms.prompts import PromptProcessor, Template

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Florence2Processor(PromptProcessor):
    """Prompts for Florence-2, whose encoder has a learned vector for each of `max_positions` positions."""

    def __init__(self, *args: Any, max_positions: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_positions = max_positions

    def positions(
        self, camera: Int[Tensor, "b l"], grids: list[tuple[int, int]]
    ) -> tuple[Int[Tensor, "b l"], Int[Tensor, "b l"]]:
        if camera.shape[1] > self.max_positions:
            raise LibrobotError(
                f"Florence-2's encoder has {self.max_positions} positions, found {camera.shape[1]} tokens "
                f"({len(grids)} pictures of {self.tokens_per_picture} tokens); take smaller pictures "
                f"('vlm.pictures={{size: {{height: 384, width: 384}}}}': 145 tokens each), fewer cameras, or "
                f"vlm=florence2_large with its 4096 positions"
            )
        return super().positions(camera, grids)


class Florence2(PretrainedVLM):
    """Both sizes. `num_layers` counts the encoder's layers; the decoder keeps all of its own.

    The encoder's tokens count their positions themselves, so the real tokens of a sample are moved together
    before it runs and back afterwards: an absent camera leaves no gap.
    """

    has_cache = False
    model_class = Florence2ForConditionalGeneration
    config_class = Florence2Config
    picture_processor_class = CLIPImageProcessor
    processor_class = Florence2Processor
    natural_attention = "bidirectional"
    template = Template(image_token="<image>", picture="<image>", lead="<s>", tail="</s>")
    special_tokens: ClassVar[dict[str, str]] = {
        "pad_token_id": "<pad>",
        "bos_token_id": "<s>",
        "eos_token_id": "</s>",
        "decoder_start_token_id": "</s>",
        "forced_eos_token_id": "</s>",
        "image_token_id": "<image>",
    }
    parts: ClassVar[dict[str, tuple[str, ...]]] = {
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "language": ("model.language_model", "lm_head"),
        "embeddings": ("model.language_model.shared", "model.language_model.encoder.embed_positions"),
    }
    adapter_targets: ClassVar[Sequence[str]] = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

    @property
    def text(self) -> nn.Module:
        """The encoder."""
        return self.model.model.language_model.encoder

    @property
    def vision_blocks(self) -> nn.ModuleList:
        return nn.ModuleList(block for stage in self.model.model.vision_tower.blocks for block in stage)

    @classmethod
    def default_picture_processor(cls, config: PreTrainedConfig) -> CLIPImageProcessor:
        return CLIPImageProcessor(
            size={"height": 768, "width": 768},
            do_center_crop=False,
            image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD,
        )

    def processor_options(self) -> dict[str, Any]:
        return {"max_positions": self.text_config.max_position_embeddings}

    def tokens_per_picture(self) -> int:
        """A token for each cell of DaViT's last map, and one for their mean."""
        made, vision = self.picture_processor, self.model.config.vision_config
        assert isinstance(made, CLIPImageProcessor)
        size = made.crop_size if made.do_center_crop else made.size
        rows, columns = size.get("height"), size.get("width")
        if not (rows and columns):
            raise ValueError(
                f"pictures.size must have a height and a width, so that all pictures have as many tokens, "
                f"found {dict(size)}; give {{height: 768, width: 768}}"
            )
        for kernel, stride, padding in zip(
            vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True
        ):
            rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in (rows, columns))
        if max(rows, columns) > vision.max_position_embeddings:
            raise ValueError(
                f"pictures.size: Florence-2 has positions for {vision.max_position_embeddings} rows and "
                f"columns of picture tokens, found {rows} x {columns}; make the pictures smaller"
            )
        return rows * columns + 1

    def never_used(self) -> list[nn.Module]:
        """Also the decoder. (The token embedding that it shares with the encoder is used all the same.)"""
        language = self.model.model.language_model
        return [*super().never_used(), language.decoder, language.encoder.embed_tokens]

    def extend(self, context: Context, x: Tensor, **options: Any) -> Context:
        raise LibrobotError(
            "Florence-2 is an encoder and a decoder, without a cache that tokens could follow: a framework "
            "that writes its actions behind the prompt needs a decoder-only backbone, such as vlm=qwen2vl"
        )

    def unused_parameters(self, layers: Sequence[int], *, logits: bool = False) -> list[nn.Parameter]:
        """All behind the last layer that is read; with `layers=()` the encoder's last is."""
        read = max(self.wanted(layers), default=len(self.blocks))
        shared = self.model.get_input_embeddings().weight
        unused = [*self.never_used(), *self.blocks[read:]]
        return [p for part in unused for p in part.parameters() if p is not shared]

    def forward(self, observation: Observation, *, layers: Sequence[int] = (-1,)) -> Context:
        """Run the encoder. With `layers=()`, `Context.hidden` is the output of its last layer."""
        inputs, mask = self._inputs(observation)
        wanted = self.wanted(layers)
        order = (~mask).int().argsort(dim=1, stable=True)  # a sample's real tokens first
        out = self.text(
            inputs_embeds=reordered(self._embed(observation, inputs), order),
            attention_mask=mask.gather(1, order).long(),
            output_hidden_states=any(layer != len(self.blocks) for layer in wanted),
        )
        back = order.argsort(dim=1)
        last = reordered(out.last_hidden_state, back)
        hidden = tuple(
            last if layer == len(self.blocks) else reordered(out.hidden_states[layer], back)
            for layer in wanted
        )
        return Context(
            hidden=hidden[-1] if hidden else last,
            layers=hidden,
            keys=(),
            values=(),
            mask=mask,
            next_position=inputs["next_position"],
            pictures=inputs["camera"] > 0,
        )

    @torch.inference_mode()
    def generate(self, observation: Observation, max_new_tokens: int = 64, **options: Any) -> list[str]:
        """The decoder's answer to each prompt, by transformers' `generate` (greedy by default)."""
        context = self(observation)
        ids = self.model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=context.hidden),
            attention_mask=context.mask.long(),
            pad_token_id=self.tokenizer.pad_token_id,
            **({"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens} | options),
        )
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _embed(self, observation: Observation, inputs: dict[str, Tensor]) -> Float[Tensor, "b l d"]:
        """Token embeddings, with the pictures' features in their places."""
        embedded = self.model.get_input_embeddings()(inputs["input_ids"])
        pictures = self._pictures(observation)
        if not pictures:
            return embedded
        features = self.model.model.get_image_features(**pictures).pooler_output
        return embedded.masked_scatter((inputs["camera"] > 0)[..., None], features.to(embedded))

    def read_config(self, checkpoint: str) -> PreTrainedConfig:
        with hub_errors(checkpoint):
            raw, _ = PreTrainedConfig.get_config_dict(checkpoint)
        if (raw.get("text_config") or {}).get("model_type") == "florence2_language":
            raise LibrobotError(
                f"vlm.checkpoint={checkpoint} holds Florence-2 in the layout of its first publication, which "
                f"came with code of its own; expected transformers' layout: take the same weights from "
                f"florence-community/Florence-2-base or florence-community/Florence-2-large"
            )
        return super().read_config(checkpoint)

    def _geometry(self) -> Geometry:
        """The encoder's, which has no rotary positions: the base is what a denoiser's own tokens get."""
        heads = self.text_config.encoder_attention_heads
        return Geometry(
            num_layers=len(self.blocks),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=self.hidden_size // heads,
            rope_theta=10_000.0,
        )

    def _check_options(
        self, prefix_attention: str | None, final_norm: bool, attention: str, freeze: Sequence[str]
    ) -> None:
        super()._check_options(prefix_attention, final_norm, attention, freeze)
        if prefix_attention == "causal":
            raise ValueError(
                "prefix_attention=causal: Florence-2's encoder attends in both directions only; take "
                "bidirectional or null"
            )
        if not final_norm:
            raise ValueError(
                "final_norm=false: each layer of Florence-2's encoder ends with its norm, and there is no "
                "final one to leave out; take true"
            )


def reordered(x: Float[Tensor, "b l d"], order: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
    """The tokens of each sample in this order."""
    return x.gather(1, order[..., None].expand_as(x))
