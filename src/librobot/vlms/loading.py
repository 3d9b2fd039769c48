"""Configuration, tokenizer and picture processor of a published backbone: from the hub, a folder, a librobot
checkpoint, or made here for random weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import cached_file

from librobot.errors import LibrobotError
from librobot.nn.pretrained import stays_unread, wants_pretrained
from librobot.nn.stored import stored_tensors

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


def read_json(checkpoint: str, name: str) -> dict[str, Any]:
    """A JSON file of the checkpoint (hub name or folder), {} where there is none."""
    path = find_file(checkpoint, name)
    with hub_errors(checkpoint):
        return json.loads(Path(path).read_text()) if path else {}


def find_file(checkpoint: str, name: str) -> str | None:
    """The path of a file of the checkpoint, downloaded where needed; None where it has no such file."""
    with hub_errors(checkpoint):
        return cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False)


def weight_files(checkpoint: str) -> list[str]:
    """The safetensors files of the checkpoint; [] where its weights have another format."""
    single = find_file(checkpoint, "model.safetensors")
    if single is not None:
        return [single]
    index = read_json(checkpoint, "model.safetensors.index.json")
    names = sorted(set(index["weight_map"].values())) if index else []
    paths = [find_file(checkpoint, name) for name in names]
    absent = [name for name, path in zip(names, paths, strict=True) if path is None]
    if absent:
        raise LibrobotError(
            f"vlm.checkpoint={checkpoint}: no {', '.join(absent)}; expected the safetensors files that "
            f"model.safetensors.index.json names"
        )
    return [path for path in paths if path is not None]


def has_weights(checkpoint: str) -> bool:
    """Whether this process takes the checkpoint's weights, or their places in its files."""
    return wants_pretrained(True) or (stays_unread() and bool(weight_files(checkpoint)))


def from_files(
    model_class: type[PreTrainedModel], checkpoint: str, config: PreTrainedConfig, options: dict[str, Any]
) -> PreTrainedModel:
    """`model_class.from_pretrained`; where published weights are to stay unread, its parameters are
    `StoredTensor`s that know their places in the files, through transformers' own conversion of names."""
    paths = weight_files(checkpoint) if stays_unread() else []
    if not paths:
        return model_class.from_pretrained(checkpoint, config=config, **options)
    model = model_class.from_pretrained(None, config=config, state_dict=stored_tensors(paths), **options)
    model.name_or_path = model.config.name_or_path = checkpoint
    with suppress(OSError):  # there need not be one
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return model


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
