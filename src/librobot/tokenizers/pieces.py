"""What the tokens of a byte-pair encoding stand for, and which of them still fit a text of known length.

A token is a run of bytes of UTF-8. It may begin or end amid a character: byte-level vocabularies, such as the
published FAST one, cut characters of two bytes. Code points are below 2048 there, so that at most one byte
is pending between two tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

# First bytes of characters of two bytes, and one of them, to complete what a token continues.
FIRST_OF_TWO = range(0xC2, 0xE0)
SOME_FIRST = b"\xc2"
# Code points below this take at most two bytes.
NUM_TWO_BYTES = 0x800
# Longer than any text: characters of a token that cannot follow.
IMPOSSIBLE = 1 << 30


@dataclass(frozen=True)
class PieceTable:
    """`pieces` are the bytes of each token, `codes` the sorted code points that the vocabulary can spell.

    The first axis of the others is whether a byte is pending before the token: how many characters the token
    completes, whether it leaves a byte pending, and how many characters it takes part in.
    """

    pieces: tuple[bytes, ...]
    codes: Int[np.ndarray, " c"]
    completed: Int[Tensor, "2 v"]
    pending: Int[Tensor, "2 v"]
    needed: Int[Tensor, "2 v"]

    @classmethod
    def of(cls, tokenizer: Any, vocab_size: int) -> PieceTable:
        """From a `tokenizers.Tokenizer`; one column more than `vocab_size`, for a stop token."""
        byte_level = (json.loads(tokenizer.to_str())["decoder"] or {}).get("type") == "ByteLevel"
        texts = [tokenizer.id_to_token(index) or "" for index in range(vocab_size)]
        pieces = _bytes_of(texts) if byte_level else tuple(text.encode() for text in texts)
        table = [[_follow(before, piece) for piece in (*pieces, b"")] for before in (b"", SOME_FIRST)]
        completed, pending = torch.tensor(table).unbind(-1)

        candidates = [chr(code) for code in range(NUM_TWO_BYTES if byte_level else vocab_size)]
        spelled = [
            ord(character)
            for character, encoding in zip(candidates, tokenizer.encode_batch(candidates), strict=True)
            if b"".join(pieces[token] for token in encoding.ids) == character.encode()
        ]
        return cls(pieces, np.array(spelled), completed, pending, completed + pending)

    def codes_of(self, tokens: Sequence[int]) -> list[int]:
        """The code points that tokens spell; what is no character, and what is no token, is left out."""
        known = b"".join(self.pieces[token] for token in tokens if 0 <= token < len(self.pieces))
        return [ord(character) for character in known.decode("utf-8", errors="ignore")]

    def nearest_code(self, codes: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """The code points themselves where the vocabulary can spell them."""
        if len(self.codes) == 1:
            return np.full_like(codes, self.codes[0])
        right = np.searchsorted(self.codes, codes).clip(1, len(self.codes) - 1)
        below, above = self.codes[right - 1], self.codes[right]
        return np.where(codes - below <= above - codes, below, above)


class Fill:
    """Allows what still fits a text of `length` characters, and stop where nothing does."""

    def __init__(self, table: PieceTable, count: int, length: int, stop: int, device: torch.device) -> None:
        self.completed, self.next_pending = table.completed.to(device), table.pending.to(device)
        self.needed, self.stop = table.needed.to(device), stop
        self.remaining = torch.full((count,), length, device=device)
        self.pending = torch.zeros_like(self.remaining)
        self.done = torch.zeros(count, dtype=torch.bool, device=device)

    def allowed(self) -> Bool[Tensor, "b v"]:
        fits = self.needed[self.pending] <= self.remaining[:, None]
        fits[:, self.stop] = ~fits.any(dim=1)
        return fits

    def advance(self, tokens: Int[Tensor, " b"]) -> None:
        stopped = self.done | (tokens == self.stop)
        left = self.remaining - self.completed[self.pending, tokens]
        pending = self.next_pending[self.pending, tokens]
        self.remaining, self.pending = left.masked_fill(stopped, 0), pending.masked_fill(stopped, 0)
        self.done = stopped | (self.remaining == 0)


def _follow(before: bytes, piece: bytes) -> tuple[int, int]:
    """How many characters the bytes complete, and whether another one is begun (1) or not (0)."""
    begun = piece[-1:] != b"" and piece[-1] in FIRST_OF_TWO
    try:
        completed = len((before + piece)[: -1 if begun else None].decode("utf-8"))
    except UnicodeDecodeError:
        return IMPOSSIBLE, 0
    return (completed, int(begun)) if piece else (IMPOSSIBLE, 0)


def _bytes_of(texts: Sequence[str]) -> tuple[bytes, ...]:
    """What a byte-level vocabulary's tokens stand for: it writes every byte as a printable character."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    # Published vocabularies also list characters that stand for no byte; such a token decodes to itself.
    return tuple(
        bytes(byte_of[character] for character in text) if byte_of.keys() >= set(text) else text.encode()
        for text in texts
    )
