"""Configuration, tokenizer and picture processor of a published backbone: from the hub, a folder, a librobot
checkpoint, or made here for random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.image_processing_utils import BaseImageProcessor

from librobot.errors import LibrobotError

TEXT_FILES = (".json", ".jinja", ".txt")


def byte_tokenizer(special: Sequence[str], pad: str | None = None, eos: str | None = None) -> FastTokenizer:
    """A tokenizer that needs no download: one token for each byte, then the `special` ones.

    It goes with random weights; published weights need their own.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return FastTokenizer(tokenizer_object=tokenizer, pad_token=pad, eos_token=eos)


def load_config(checkpoint: str, expected: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The checkpoint's configuration. Raises LibrobotError where it is missing or of another family."""
    with hub_errors(checkpoint):
        config = AutoConfig.from_pretrained(checkpoint)
    if not isinstance(config, expected):
        raise LibrobotError(
            f"vlm.checkpoint={checkpoint} holds a {config.model_type} model, this option of vlm= reads "
            f"{expected.model_type}; choose the vlm= option of that family, or another checkpoint"
        )
    return config


def load_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    with hub_errors(checkpoint):
        return AutoTokenizer.from_pretrained(checkpoint)


@contextmanager
def hub_errors(checkpoint: str) -> Iterator[None]:
    """Turn what the hub library raises for a checkpoint that cannot be had into one clear error."""
    try:
        yield
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        folder = Path(checkpoint).expanduser()
        if folder.is_dir():
            held = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            raise LibrobotError(
                f"vlm.checkpoint={checkpoint}: the folder does not hold a complete model ({first}); it has "
                f"{held}. Expected what save_pretrained writes: config.json, *.safetensors, tokenizer.json, "
                f"preprocessor_config.json"
            ) from error
        raise LibrobotError(
            f"vlm.checkpoint={checkpoint}: neither a folder nor a model that the hub or its cache gives "
            f"({first}). Without network, download it elsewhere and set vlm.checkpoint=FOLDER, or build "
            f"random weights with vlm.pretrained=false"
        ) from error


def text_files(config: PreTrainedConfig, *parts: Any) -> dict[str, str]:
    """File name -> contents of what the configuration and the `parts` (tokenizer, picture processor) save."""
    with tempfile.TemporaryDirectory() as folder:
        for part in (config, *parts):
            part.save_pretrained(folder)
        return {p.name: p.read_text() for p in sorted(Path(folder).iterdir()) if p.suffix in TEXT_FILES}


@contextmanager
def as_folder(files: Mapping[str, str]) -> Iterator[str]:
    """A temporary folder with these files."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text)
        yield folder


def check_picture_processor(processor: BaseImageProcessor, checkpoint: str, expected: type) -> None:
    """Raise LibrobotError where a checkpoint brings another family's picture processor."""
    if not isinstance(processor, expected):
        raise LibrobotError(
            f"vlm.checkpoint={checkpoint}: its pictures are prepared by {type(processor).__name__}, expected "
            f"{expected.__name__}"
        )
