"""Instructions as a fixed number of tokens, for a framework that reads language without a `vlm=`."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from librobot.nn.text import PAD, ByteEmbedding, ByteTokenizer


class InstructionEncoder(nn.Module):
    """Reads what `processor` made of the prompts (it runs in data workers) and gives `num_tokens` tokens."""

    processor: Callable[..., dict[str, Tensor]]
    width: int
    num_tokens: int

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Float[Tensor, "b l d"], Bool[Tensor, "b l"]]:
        """The tokens, and which of them are real."""
        raise NotImplementedError

    def files(self) -> dict[str, str]:
        """Name -> text of what a checkpoint has to hold, beside weights, to build this encoder again."""
        return {}


class ByteInstruction(InstructionEncoder):
    """Neighbouring bytes of at most `max_prompt_tokens` (a start token among them), shared out to
    `num_tokens`; what reads the tokens has to learn the language."""

    def __init__(self, width: int, max_prompt_tokens: int, num_tokens: int) -> None:
        super().__init__()
        bytes_per_token = -(-max_prompt_tokens // num_tokens)
        self.processor = ByteTokenizer(max_prompt_tokens)
        self.embedding = ByteEmbedding(width, bytes_per_token)
        self.width = width
        self.num_tokens = num_tokens
        self.num_bytes = num_tokens * bytes_per_token

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Float[Tensor, "b l d"], Bool[Tensor, "b l"]]:
        short_by = self.num_bytes - inputs["tokens"].shape[1]
        tokens = functional.pad(inputs["tokens"], (0, short_by), value=PAD)
        return self.embedding(tokens, functional.pad(inputs["token_mask"], (0, short_by)))
