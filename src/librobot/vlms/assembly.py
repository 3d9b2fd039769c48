"""Where a published backbone's parts come from: hub, folder, librobot checkpoint, or random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from transformers import AutoImageProcessor, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from librobot.nn.pretrained import stored_files
from librobot.vlms.base import VLM
from librobot.vlms.loading import (
    as_folder,
    byte_tokenizer,
    check_picture_processor,
    from_files,
    has_weights,
    hub_errors,
    load_config,
    load_tokenizer,
    text_files,
)
from librobot.vlms.prompts import token_id


class AssembledVLM(VLM):
    """One of transformers' models with its tokenizer and its picture processor."""

    model: Any  # of `model_class`; transformers' modules have no types to speak of
    model_class: ClassVar[type[PreTrainedModel]]
    config_class: ClassVar[type[PreTrainedConfig]]
    picture_processor_class: ClassVar[type[BaseImageProcessor]]
    special_tokens: ClassVar[Mapping[str, str]]
    """Role in the configuration ("image_token_id", "pad_token_id", ...) -> token, for random weights."""
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "language": ("model.language_model", "lm_head"),
        "embeddings": ("model.language_model.embed_tokens",),
    }
    """Name ("vision", "projector", "language", "embeddings") -> beginnings of parameter names."""
    tokenizer: PreTrainedTokenizerBase
    picture_processor: BaseImageProcessor

    def assemble(
        self,
        checkpoint: str | None,
        pretrained: bool,
        config: Mapping[str, Any] | None,
        pictures: dict[str, Any],
        attention: str,
        dtype: str,
    ) -> None:
        """Make `model`, `tokenizer` and `picture_processor`; `config` is for random weights alone."""
        options: dict[str, Any] = {"attn_implementation": attention, "dtype": getattr(torch, dtype)}
        files = stored_files()
        if files:
            with as_folder(files) as folder:
                self.read_parts(folder, {})
                made = self.read_config(folder)
            self.model = self._from_config(made, options)
        elif pretrained:
            if checkpoint is None:
                raise ValueError(
                    "checkpoint must name a model of the hub or a folder where pretrained=true; "
                    "pretrained=false builds random weights"
                )
            made = self.read_config(checkpoint)
            self.read_parts(checkpoint, pictures)
            if has_weights(checkpoint):
                with hub_errors(checkpoint):
                    self.model = self.load_model(checkpoint, made, options)
            else:
                self.model = self._from_config(made, options)
        else:
            made = self.config_class(**dict(config or {}))
            self.tokenizer = byte_tokenizer(
                [*dict.fromkeys((*self.special_tokens.values(), *self.plain_specials()))],
                pad=self.special_tokens.get("pad_token_id"),
                eos=self.special_tokens.get("eos_token_id"),
            )
            for role, token in self.special_tokens.items():
                self.set_token(made, role, token_id(self.tokenizer, token))
            self.picture_processor = self.default_picture_processor(made)
            for name, value in pictures.items():
                setattr(self.picture_processor, name, value)
            self.model = self._from_config(made, options)
        self.model.config.use_cache = True

    def _from_config(self, config: PreTrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
        return self.model_class._from_config(config, **options)

    def load_model(
        self, checkpoint: str, config: PreTrainedConfig, options: dict[str, Any]
    ) -> PreTrainedModel:
        """The published weights; a family whose files have another layout converts them here."""
        return from_files(self.model_class, checkpoint, config, options)

    def read_config(self, checkpoint: str) -> PreTrainedConfig:
        """The checkpoint's configuration; a family whose files have another layout converts it here."""
        return load_config(checkpoint, self.config_class)

    def read_parts(self, checkpoint: str, pictures: dict[str, Any]) -> None:
        self.tokenizer = load_tokenizer(checkpoint)
        with hub_errors(checkpoint):
            # torchvision's pictures stay on the device, where transformers would take some families' to PIL
            self.picture_processor = AutoImageProcessor.from_pretrained(
                checkpoint, backend="torchvision", **pictures
            )
        check_picture_processor(self.picture_processor, checkpoint, self.picture_processor_class)

    @classmethod
    def plain_specials(cls) -> list[str]:
        """Special tokens of the template that the configuration does not name."""
        return []

    @classmethod
    def set_token(cls, config: PreTrainedConfig, role: str, value: int) -> None:
        """Put a token's id where the family's configuration keeps it."""
        if hasattr(config, role):
            setattr(config, role, value)
        text = config.get_text_config()
        if text is not config and hasattr(text, role):
            setattr(text, role, value)

    def part_of(self, parameter: str) -> str:
        """The part that a parameter of the model belongs to: that with the longest fitting beginning."""
        fitting = [
            (len(start), part)
            for part, starts in self.parts.items()
            for start in starts
            if parameter == start or parameter.startswith(f"{start}.")
        ]
        return max(fitting)[1] if fitting else "language"

    @classmethod
    def default_picture_processor(cls, config: PreTrainedConfig) -> BaseImageProcessor:
        """How pictures are prepared for random weights of this configuration."""
        return cls.picture_processor_class()

    def files(self) -> dict[str, str]:
        return text_files(self.model.config, self.tokenizer, self.picture_processor)
