"""One token per number: each action dimension of each step falls into one of a few equal bins.

    uniform   num_bins bins over [low, high], decoded to their centres (RT-2, Brohan et al. 2023, section 3.2)
    openvla   num_bins EDGES from low to high, and so one bin less; the last token means `high` or above and
              decodes like the one before it (Kim et al. 2024, section 3.2, and its published code)

Values outside [low, high] fall into the outermost bins: take a normalization that bounds actions, such as
framework.normalization.action=quantile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

Convention = Literal["uniform", "openvla"]


class Bins:
    """Tokens 0 .. num_bins - 1 from the lowest bin to the highest, without a stop token."""

    mixes = False
    fitted = True

    def __init__(
        self,
        *,
        num_bins: int = 256,
        low: float = -1.0,
        high: float = 1.0,
        convention: Convention = "uniform",
    ) -> None:
        if convention not in get_args(Convention):
            raise ValueError(f"convention must be one of {get_args(Convention)}, found {convention!r}")
        if num_bins < 2:
            raise ValueError(f"num_bins must be at least 2, found {num_bins}")
        if low >= high:
            raise ValueError(f"low must be below high, found low={low} and high={high}")
        self.num_bins, self.low, self.high = num_bins, low, high
        self.num_centres = num_bins if convention == "uniform" else num_bins - 1
        # What `high` itself belongs to: the last bin, or OpenVLA's token above it.
        self.edges = torch.linspace(low, high, self.num_centres + 1, dtype=torch.float64)

    @property
    def vocabulary(self) -> int:
        return self.num_bins

    @property
    def max_tokens(self) -> int:
        return self.horizon * self.action_dim

    def attach(self, *, horizon: int, action_dim: int) -> None:
        self.horizon, self.action_dim = horizon, action_dim

    def fit(self, actions: Float[Tensor, "n k a"]) -> None:
        """Nothing to learn."""

    def encode(self, actions: Float[Tensor, "b k a"]) -> tuple[Int[Tensor, "b l"], Bool[Tensor, "b l"]]:
        flat = rearrange(actions.detach(), "b k a -> b (k a)").double().contiguous()
        # A bin holds its lower edge.
        ids = torch.bucketize(flat, self.edges.to(flat.device), right=True) - 1
        ids = ids.clamp(0, self.num_bins - 1)
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def decode(self, ids: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b k a"]:
        """Missing tokens count as the middle of the range, surplus ones are cut off."""
        width = (self.high - self.low) / self.num_centres
        centres = self.low + width * (ids.clamp(0, self.num_centres - 1).float() + 0.5)
        numbers = torch.where(mask, centres, (self.low + self.high) / 2)[:, : self.max_tokens]
        missing = numbers.new_full((len(ids), self.max_tokens - numbers.shape[1]), (self.low + self.high) / 2)
        return rearrange(torch.cat((numbers, missing), dim=1), "b (k a) -> b k a", a=self.action_dim)

    def constrain(self, count: int, device: torch.device) -> Countdown:
        return Countdown(count, self.max_tokens, self.num_bins, device)

    def files(self) -> dict[str, str]:
        return {}

    def restore(self, files: Mapping[str, str]) -> None:
        """Nothing was learned."""


class Countdown:
    """Any token, a fixed number of times."""

    def __init__(self, count: int, length: int, vocabulary: int, device: torch.device) -> None:
        self.remaining = length
        self.done = torch.zeros(count, dtype=torch.bool, device=device)
        self.everything = torch.ones(count, vocabulary, dtype=torch.bool, device=device)

    def allowed(self) -> Bool[Tensor, "b v"]:
        return self.everything

    def advance(self, tokens: Int[Tensor, " b"]) -> None:
        self.remaining -= 1
        self.done = torch.full_like(self.done, self.remaining <= 0)


class BinsToVocabulary:
    """Which of a language model's tokens stands for each bin: `ids[bin]`, all different."""

    def __init__(self, ids: Sequence[int]) -> None:
        if len(set(ids)) < len(ids):
            raise ValueError(f"ids must name a different token for each of {len(ids)} bins, found {ids}")
        self.ids = torch.tensor(ids)

    @classmethod
    def last(cls, vocab_size: int, num_bins: int = 256) -> BinsToVocabulary:
        """OpenVLA: the vocabulary's last tokens, backwards (bin 0 is the very last one)."""
        return cls([vocab_size - 1 - index for index in range(num_bins)])

    @classmethod
    def integers(cls, tokenize: Callable[[str], Sequence[int]], num_bins: int = 256) -> BinsToVocabulary:
        """RT-2 on PaLI-X: the tokens of the integers themselves. `tokenize` gives a text's ids, without
        special tokens; raises ValueError where an integer is not a single token."""
        ids = [list(tokenize(str(index))) for index in range(num_bins)]
        for index, found in enumerate(ids):
            if len(found) != 1:
                raise ValueError(
                    f"tokenize must give one token for every integer below {num_bins}, found {found} for "
                    f"{index}; take the last or the least used tokens"
                )
        return cls([found[0] for found in ids])

    @classmethod
    def least_used(cls, counts: Int[Tensor, " v"], num_bins: int = 256) -> BinsToVocabulary:
        """RT-2 on PaLM-E: the tokens that are rarest in a corpus, of which `counts` holds every token's
        occurrences; the rarest is bin 0, and of equally rare ones the lower id comes first."""
        if len(counts) < num_bins:
            raise ValueError(f"counts must cover at least {num_bins} tokens, found {len(counts)}")
        return cls(torch.as_tensor(counts).argsort(stable=True)[:num_bins].tolist())

    def to_vocabulary(self, bins: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        return self.ids.to(bins.device)[bins]

    def to_bins(self, ids: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """The bins of tokens; a token that stands for none counts as the nearest id that does."""
        known = self.ids.to(ids.device)
        ordered, order = known.sort()
        right = torch.searchsorted(ordered, ids.contiguous()).clamp(1, len(ordered) - 1)
        nearest = right - (ids - ordered[right - 1] <= ordered[right] - ids).long()
        return order[nearest]
