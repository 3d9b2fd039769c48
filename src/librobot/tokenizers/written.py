"""Action tokens as a language model writes them: in its own vocabulary, between words of its own.

    lead          what it writes first, such as "Action: "
    tokens        those of another tokenizer, each as the language token that stands for it
    after         what it writes behind them, such as "|" and the end of the text

A head sees one tokenizer over the whole vocabulary: lead and end are learned as the tokens are, and all of
the vocabulary competes in the softmax (RT-2, Brohan et al. 2023; OpenVLA, Kim et al. 2024; pi0-FAST, Pertsch
et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from librobot.tokenizers.base import ActionTokenizer, Constraint


class WrittenTokens:
    """`inner` makes tokens of chunks; `ids` gives the language tokens that stand for them (asked for every
    time, as a checkpoint may bring them), `size` the number of language tokens.

    Where `inner` has a stop token, the first of `after` stands for it, and `ids` need not name one.
    `constrained` False lets the model write what it likes until the first of `after`; a chunk whose text
    holds anything else than action tokens is then all zeros, as in openpi.
    """

    def __init__(
        self,
        inner: ActionTokenizer,
        ids: Callable[[], Int[Tensor, " v"]],
        size: int,
        *,
        after: Sequence[int],
        lead: Sequence[int] = (),
        constrained: bool = True,
    ) -> None:
        self.inner, self._ids, self.size = inner, ids, size
        self.lead, self.after, self.constrained = tuple(lead), tuple(after), constrained
        self.stop: int | None = getattr(inner, "stop", None)

    @property
    def mixes(self) -> bool:
        return self.inner.mixes

    @property
    def fitted(self) -> bool:
        return self.inner.fitted

    @property
    def vocabulary(self) -> int:
        return self.size

    @property
    def max_tokens(self) -> int:
        return len(self.lead) + self.inner.max_tokens + len(self.after)

    @property
    def around(self) -> tuple[int, int]:
        """How many tokens stand before and behind those of a chunk's numbers."""
        return len(self.lead), len(self.after)

    def attach(self, *, horizon: int, action_dim: int) -> None:
        self.inner.attach(horizon=horizon, action_dim=action_dim)

    def fit(self, actions: Float[Tensor, "n k a"]) -> None:
        self.inner.fit(actions)

    def files(self) -> dict[str, str]:
        return self.inner.files()

    def restore(self, files: Mapping[str, str]) -> None:
        self.inner.restore(files)

    def ids(self, device: torch.device) -> Int[Tensor, " v"]:
        """The language token of each of the inner tokenizer's tokens."""
        ids = self._ids().to(device)
        if self.stop is None or len(ids) == self.inner.vocabulary:
            return ids
        return torch.cat((ids, ids.new_tensor([self.after[0]])))

    def inner_of(self, device: torch.device) -> Int[Tensor, " size"]:
        """The inner token of each language token; -1 where it stands for none."""
        ids = self.ids(device)
        table = ids.new_full((self.size,), -1)
        table[ids] = torch.arange(len(ids), device=device)
        return table

    def encode(self, actions: Float[Tensor, "b k a"]) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"]]:
        tokens, real = self.inner.encode(actions)
        counts = real.sum(dim=1)
        if self.stop is not None:
            counts = counts - 1  # it is written as the first of `after`
        device = tokens.device
        length = len(self.lead) + int(counts.max()) + len(self.after)
        written = tokens.new_full((len(tokens), length), self.after[-1])
        written[:, : len(self.lead)] = tokens.new_tensor(self.lead)
        meant = self.ids(device)[tokens][:, : length - len(self.lead)]
        written[:, len(self.lead) : len(self.lead) + meant.shape[1]] = meant
        ends = len(self.lead) + counts[:, None] + torch.arange(len(self.after), device=device)
        written.scatter_(1, ends, tokens.new_tensor(self.after).expand_as(ends))
        place = torch.arange(length, device=device)
        return written, place < (len(self.lead) + counts + len(self.after))[:, None]

    def decode(self, ids: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b k a"]:
        """What follows the lead, up to the first token behind the actions."""
        led = (ids[:, : len(self.lead)] == ids.new_tensor(self.lead)).all(dim=1)
        body, mask = ids[:, len(self.lead) :], mask[:, len(self.lead) :]
        open_ = (body != self.after[0]).cumprod(dim=1).bool()
        known = self.inner_of(ids.device)[body]
        readable = led & ((known >= 0) | ~(mask & open_)).all(dim=1)
        actions = self.inner.decode(known.clamp_min(0), mask & open_)
        return torch.where(readable[:, None, None], actions, 0.0)

    def constrain(self, count: int, device: torch.device) -> Constraint:
        if not self.constrained:
            return Free(count, self.size, self.after[0], device)
        return Words(self, count, device)


class Words:
    """Allows the lead, then what the inner tokenizer's constraint does. What stands behind the actions says
    nothing new, and is not waited for."""

    def __init__(self, written: WrittenTokens, count: int, device: torch.device) -> None:
        self.lead, self.step = written.lead, 0
        self.ids, self.inner_of = written.ids(device), written.inner_of(device)
        self.inner: Any = written.inner.constrain(count, device)
        self.nothing = torch.zeros(count, written.size, dtype=torch.bool, device=device)
        self.done = self.inner.done

    def allowed(self) -> Bool[Tensor, "b v"]:
        allowed = self.nothing.clone()
        if self.step < len(self.lead):
            allowed[:, self.lead[self.step]] = True
        else:
            allowed[:, self.ids] = self.inner.allowed()
        return allowed

    def advance(self, tokens: Int[Tensor, " b"]) -> None:
        if self.step < len(self.lead):
            self.step += 1
        else:
            self.inner.advance(self.inner_of[tokens].clamp_min(0))
            self.done = self.inner.done


class Free:
    """Allows everything, until `stop` is written."""

    def __init__(self, count: int, size: int, stop: int, device: torch.device) -> None:
        self.stop = stop
        self.done = torch.zeros(count, dtype=torch.bool, device=device)
        self.everything = torch.ones(count, size, dtype=torch.bool, device=device)

    def allowed(self) -> Bool[Tensor, "b v"]:
        return self.everything

    def advance(self, tokens: Int[Tensor, " b"]) -> None:
        self.done = self.done | (tokens == self.stop)


def padded_weights(weights: Float[Tensor, "b m"], around: tuple[int, int]) -> Float[Tensor, "b l"]:
    """Weights of a chunk's numbers with those of the tokens around them: 1 where any number counts."""
    any_number = (weights > 0).any(dim=1, keepdim=True).to(weights)
    before, behind = (any_number.expand(-1, count) for count in around)
    return torch.cat((before, weights, behind), dim=1)
