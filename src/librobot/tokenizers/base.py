"""The contract of an action tokenizer: normalised chunks to tokens and back.

Tokens are 0 .. vocabulary - 1. A tokenizer may be defined by data (`fit`), and it says at every step which
tokens can still follow (`constrain`), so that whatever is sampled decodes to exactly one chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Constraint(Protocol):
    """What sequences under way can go on with. `done` is True for rows that need no further token."""

    done: Bool[Tensor, " b"]

    def allowed(self) -> Bool[Tensor, "b v"]:
        """The tokens that may follow; at least one in each row."""
        ...

    def advance(self, tokens: Int[Tensor, " b"]) -> None:
        """Take note of the tokens just chosen; what is chosen for rows that are done is left out."""
        ...


class ActionTokenizer(Protocol):
    @property
    def mixes(self) -> bool:
        """Whether a token stands for several numbers of a chunk. Otherwise token i is number i of the
        flattened chunk: all dimensions of the first step, then those of the second."""
        ...

    @property
    def fitted(self) -> bool:
        """Whether the tokens are known; `encode`, `decode` and `constrain` raise ValueError before."""
        ...

    @property
    def vocabulary(self) -> int:
        """The number of tokens, a stop token included where there is one; known before `fit`."""
        ...

    @property
    def max_tokens(self) -> int:
        """The most tokens that a chunk can take, a stop token included; known before `fit`."""
        ...

    def attach(self, *, horizon: int, action_dim: int) -> None:
        """Learn the chunk's shape (k, a), before anything else is called."""
        ...

    def fit(self, actions: Float[Tensor, "n k a"]) -> None:
        """Define the tokens by normalised chunks."""
        ...

    def encode(self, actions: Float[Tensor, "b k a"]) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"]]:
        """Tokens of finite actions, and a mask that is True on them and False on what fills rows up."""
        ...

    def decode(self, ids: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b k a"]:
        """The actions, in float32. Any sequence of tokens gives some: an unfinished one is filled up."""
        ...

    def constrain(self, count: int, device: torch.device) -> Constraint:
        """The constraint of `count` sequences that begin."""
        ...

    def files(self) -> dict[str, str]:
        """Name -> text of what restores a fitted tokenizer; empty where data do not define it."""
        ...

    def restore(self, files: Mapping[str, str]) -> None:
        """The reverse of `files`."""
        ...
