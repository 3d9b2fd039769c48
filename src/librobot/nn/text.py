"""Text without a vocabulary file: bytes as tokens, their embedding, and a small sentence encoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

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


class ByteEmbedding(nn.Module):
    """A vector for every `bytes_per_token` neighbouring bytes: a strided linear map of the bytes' embeddings.

    Attention's cost then falls with that factor (the downsampling of CANINE, Clark et al. 2022). A token is
    real where any of its bytes is.
    """

    def __init__(self, width: int, bytes_per_token: int = 1) -> None:
        super().__init__()
        if bytes_per_token < 1:
            raise ValueError(f"bytes_per_token must be at least 1, found {bytes_per_token}")
        self.stride = bytes_per_token
        self.table = nn.Embedding(NUM_BYTE_TOKENS, width)
        nn.init.normal_(self.table.weight, std=0.5)
        self.merge = nn.Linear(bytes_per_token * width, width) if bytes_per_token > 1 else None

    def forward(
        self, tokens: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b m d"], Bool[Tensor, "b m"]]:
        if self.merge is None:
            return self.table(tokens), mask
        short_by = -tokens.shape[1] % self.stride
        mask = functional.pad(mask, (0, short_by))
        tokens = functional.pad(tokens, (0, short_by), value=PAD)
        x = rearrange(self.table(tokens) * mask[..., None], "b (m r) d -> b m (r d)", r=self.stride)
        return self.merge(x), rearrange(mask, "b (m r) -> b m r", r=self.stride).any(dim=-1)


class ByteEncoder(nn.Module):
    """One vector per prompt: embedding, three convolutions over bytes, a maximum over the real ones.

    A byte sees six others on either side, enough for a colour and its noun. Padding is set to zero before
    each convolution, so its length changes nothing.
    """

    def __init__(self, width: int, *, inner_width: int = 64, kernel_size: int = 5) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.embedding = nn.Embedding(NUM_BYTE_TOKENS, inner_width)
        self.first = nn.Conv1d(inner_width, inner_width, kernel_size, padding=padding)
        self.second = nn.Conv1d(inner_width, inner_width, kernel_size, padding=padding)
        self.third = nn.Conv1d(inner_width, width, kernel_size, padding=padding)

    def forward(self, tokens: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        # A batch repeats its instructions: each is encoded once.
        tokens, place = torch.unique(tokens.masked_fill(~mask, PAD), dim=0, return_inverse=True)
        real = (tokens != PAD)[:, None]
        x = self.embedding(tokens).transpose(1, 2) * real
        x = functional.relu(self.first(x)) * real
        x = (x + functional.relu(self.second(x))) * real
        x = functional.relu(self.third(x)) * real  # not below 0, so padding never wins
        return x.amax(dim=-1)[place]
