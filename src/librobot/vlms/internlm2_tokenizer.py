"""InternLM2's tokenizer from its published files, without their Python code.

The repositories hold a SentencePiece model (`tokenizer.model`, byte-pair encoding with byte fallback) and
the special tokens with their ids (`added_tokens.json`, `tokenizer_config.json`). Some special tokens take the
place of pieces that the model keeps unused: `<|im_start|>` is number 92543.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

from librobot.errors import LibrobotError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces in a SentencePiece model
SPACE = "▁"


def sentencepiece_protobuf() -> ModuleType:
    try:
        return import_protobuf()
    except ImportError as error:
        raise LibrobotError(
            "reading tokenizer.model needs protobuf: pip install protobuf, or put the tokenizer.json of a "
            "fast tokenizer into the folder of vlm.checkpoint"
        ) from error


def build_tokenizer(path: str | Path, special: dict[str, int], roles: dict[str, str]) -> FastTokenizer:
    """The tokenizer of the SentencePiece model at `path`.

    `special` are the added tokens and their ids; `roles` name the tokens ("bos_token", "eos_token",
    "pad_token", "unk_token"). Raises LibrobotError where the file is not a byte-pair-encoding model.
    """
    model: Any = sentencepiece_protobuf().ModelProto()
    try:
        model.ParseFromString(Path(path).read_bytes())
    except Exception as error:  # protobuf's DecodeError has no stable place to import it from
        raise LibrobotError(f"{path} is not a SentencePiece model ({error}); download it again") from error
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise LibrobotError(f"{path}: expected a byte-pair-encoding SentencePiece model, found another kind")
    replaced = set(special.values())
    pieces = [(piece.piece, i, piece.type) for i, piece in enumerate(model.pieces) if i not in replaced]
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    normal = {text: i for text, i, kind in pieces if kind == NORMAL}
    merges = generate_merges(normal, {text: scores[text] for text in normal})
    unknown = [text for text, _, kind in pieces if kind == UNKNOWN] or [roles.get("unk_token", "<unk>")]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: i for text, i, _ in pieces} | special,
            merges=merges,
            unk_token=unknown[0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = _normalizer(model.normalizer_spec)
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False) for text, _, kind in pieces if kind == USER_DEFINED]
    )
    control = [text for text, _, kind in pieces if kind in (UNKNOWN, CONTROL)]
    ordered = sorted(special, key=special.__getitem__)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in (*control, *ordered)])
    return FastTokenizer(tokenizer_object=tokenizer, **roles)


def _normalizer(spec: Any) -> normalizers.Normalizer:
    """What SentencePiece does to a text before it looks for pieces."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
