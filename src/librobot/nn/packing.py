"""Sequence packing: the real tokens of padded rows in fewer rows, several samples one behind the other
(Krell et al. 2021, arXiv 2107.02027).

    padded        a a a a a a        packed        a a a a a a        sees    a . .
                  b b b . . .                      b b b c c .                . b .
                  c c . . . .                                                 . . c

Whoever computes over the packed rows must keep the samples apart: a token sees its own sample alone
(`packed_mask`), and positions come with the tokens (`pack` moves them too). What is then computed for each
token is what the padded rows would have given.

A row is filled by first-fit-decreasing. Its length, where none is given, is the shortest that leaves at most
`AT_MOST` of the computed tokens empty: samples that are all longer than half of the longest do not fit into
its length in pairs, and attention's cost grows with a row's length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from librobot.nn.attention import block_mask, with_self

AT_MOST = 0.05


@dataclass(frozen=True)
class Packing:
    """Where tokens go: `source` is each packed token's place in the padded rows, counted row by row, `place`
    each real token's place in the packed rows (0 for padding), `sample` the sample of each packed token, -1
    where a row is not full."""

    source: Int[Tensor, "r c"]
    sample: Int[Tensor, "r c"]
    place: Int[Tensor, "b l"]
    num_real: int

    @property
    def padding(self) -> float:
        """The share of the packed tokens that belong to no sample."""
        return 1.0 - self.num_real / self.source.numel()


def plan_packing(mask: Bool[Tensor, "b l"], length: int | None = None) -> Packing:
    """A packing of the tokens that `mask` admits, in their order.

    `length` is that of the rows; a sample that has more tokens makes them as long as it needs, and None takes
    the shortest that are full enough. Reads the samples' lengths to the host.
    """
    if length is not None and length < 1:
        raise ValueError(f"length must be at least 1 token, found {length}")
    lengths: list[int] = mask.sum(dim=1).tolist()
    row, offset = choose_rows(lengths, length)
    size = max(1, *(start + count for start, count in zip(offset, lengths, strict=True)))
    total = size * (max(row) + 1)
    first = torch.tensor([r * size + o for r, o in zip(row, offset, strict=True)], device=mask.device)
    order = first[:, None] + mask.long().cumsum(dim=1) - 1
    goes_to = torch.where(mask, order, total).flatten()  # padding goes behind the last row, which is cut off
    here = torch.arange(mask.numel(), device=mask.device)
    source = here.new_zeros(total + 1).scatter_(0, goes_to, here)[:-1]
    sample = here.new_full((total + 1,), -1).scatter_(0, goes_to, here // mask.shape[1])[:-1]
    return Packing(
        source=source.view(-1, size),
        sample=sample.view(-1, size),
        place=order.masked_fill(~mask, 0),
        num_real=sum(lengths),
    )


def pack(x: Tensor, packing: Packing) -> Tensor:
    """(b, l, ...) to (r, c, ...). What fills a row up has arbitrary values."""
    flat = x.flatten(0, 1).index_select(0, packing.source.flatten())
    return flat.unflatten(0, packing.source.shape)


def unpack(y: Tensor, packing: Packing) -> Tensor:
    """(r, c, ...) to (b, l, ...), the reverse of `pack`. Padding has arbitrary values."""
    return take(y, packing.place)


def take(y: Tensor, places: Int[Tensor, "b m"]) -> Tensor:
    """The packed tokens (r, c, ...) at `places`: (b, m, ...)."""
    return y.flatten(0, 1).index_select(0, places.flatten()).unflatten(0, places.shape)


def packed_mask(packing: Packing, blocks: Int[Tensor, "b l"]) -> Bool[Tensor, "r c c"]:
    """A token sees the tokens of its sample that are in its own and in earlier `blocks` (see `block_mask`);
    what fills a row up sees itself."""
    sample, packed = packing.sample, pack(blocks, packing)
    same = sample[:, :, None] == sample[:, None, :]
    return with_self(block_mask(packed, packed, sample >= 0) & same)


def choose_rows(
    lengths: Sequence[int], length: int | None, at_most: float = AT_MOST
) -> tuple[list[int], list[int]]:
    """Each sample's row and where in it the sample begins."""
    if length is not None:
        return first_fit_decreasing(lengths, max(length, *lengths, 1))
    for capacity in capacities(lengths, at_most):
        row, offset = first_fit_decreasing(lengths, capacity)
        size = max(start + count for start, count in zip(offset, lengths, strict=True))
        if sum(lengths) >= (1.0 - at_most) * size * (max(row) + 1):
            break
    return row, offset


def capacities(lengths: Sequence[int], at_most: float) -> Iterator[int]:
    """Lengths of rows worth a try, the shortest first; the last holds everything."""
    longest, total = max(lengths), sum(lengths)
    yield max(1, longest)
    rows = total // max(1, longest)
    while rows >= 1:
        yield max(1, longest, math.floor(total / (rows * (1.0 - at_most))))
        rows -= max(1, rows // 8)


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> tuple[list[int], list[int]]:
    """Each sample, the longest first, goes behind those of the first row that has room for it."""
    row, offset, used = [0] * len(lengths), [0] * len(lengths), list[int]()
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        number = next((n for n, taken in enumerate(used) if taken + lengths[i] <= capacity), len(used))
        if number == len(used):
            used.append(0)
        row[i], offset[i] = number, used[number]
        used[number] += lengths[i]
    return row, offset
