"""Text without a vocabulary file: bytes as tokens, and a small convolutional sentence encoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from librobot.errors import LibrobotError

PAD, BOS, NUM_BYTE_TOKENS = 256, 257, 258


@dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes after a BOS token, padded on the right to the batch's longest prompt.

    Returns `tokens` (b, l) and `token_mask` (b, l), True on BOS and bytes. A prompt of more than `max_tokens`
    tokens is an error: cutting it would hide part of the instruction.
    """

    max_tokens: int

    def __call__(self, prompts: list[str], images: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        encoded = [[BOS, *prompt.encode()] for prompt in prompts]
        longest = max(encoded, key=len)
        if len(longest) > self.max_tokens:
            text = bytes(longest[1:]).decode()
            raise LibrobotError(
                f"a prompt may have {self.max_tokens - 1} bytes, found {len(longest) - 1}: {text!r}; "
                f"shorten it or raise max_prompt_tokens to at least {len(longest)}"
            )
        tokens = torch.tensor([row + [PAD] * (len(longest) - len(row)) for row in encoded])
        return {"tokens": tokens, "token_mask": tokens != PAD}


class ByteEncoder(nn.Module):
    """One vector per prompt: embedding, two convolutions over bytes, a maximum over the real ones.

    Padding is set to zero before each convolution, so its length changes nothing.
    """

    def __init__(self, width: int, *, kernel_size: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_BYTE_TOKENS, width)
        self.first = nn.Conv1d(width, width, kernel_size, padding=kernel_size // 2)
        self.second = nn.Conv1d(width, width, kernel_size, padding=kernel_size // 2)
        self.width = width

    def forward(self, tokens: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        padding = ~mask[:, None]
        x = self.embedding(tokens).transpose(1, 2).masked_fill(padding, 0.0)
        x = nn.functional.gelu(self.first(x)).masked_fill(padding, 0.0)
        x = self.second(x).masked_fill(padding, float("-inf"))
        return x.amax(dim=-1)
