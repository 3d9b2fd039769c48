"""The backbone's own language model as the network of a head that predicts tokens.

    prefix    pictures and prompt: the backbone's context, computed once
    start     tokens that the method puts behind the prompt and that nobody predicts
    answer    what the model writes: each token from the one before it, the first from the last of the above

Training runs over the whole answer in one causal pass (`VLM.extend`), or over prefix and answer in one, of
several samples in each row (`pack`). Decoding adds one token at a time to the cache, and computes nothing
twice. `ActionTokens` says which of the vocabulary's tokens mean actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from librobot.heads.base import ActionHead
from librobot.tokenizers.written import WrittenTokens
from librobot.types import Observation
from librobot.vlms.base import VLM, Context

if TYPE_CHECKING:
    from librobot.frameworks.base import Framework

CROWDED = 10
"""A vocabulary gives up tokens if it has at least this many times as many."""


class ActionTokens(nn.Module):
    """The `count` language tokens that mean actions: `ids`, kept in the checkpoint.

    Where the vocabulary has room they are its own last ones, backwards, after `skip` (OpenVLA: 0, pi0-FAST:
    128), whose meaning training overwrites. A small vocabulary (bytes) keeps all of its tokens, and new ones
    are appended: with an embedding and an output row each, which are this module's and no part of the
    backbone. `ids` given are taken as they are.
    """

    ids: Tensor

    def __init__(self, vlm: VLM, count: int, *, skip: int = 0, ids: Sequence[int] | None = None) -> None:
        super().__init__()
        words = vlm.vocabulary
        self.embedding: nn.Parameter | None = None
        self.output: nn.Parameter | None = None
        self.base_size = words.size
        if ids is not None:
            chosen = torch.tensor(list(ids))
        elif words.num_text >= CROWDED * (count + skip):
            chosen = words.num_text - 1 - skip - torch.arange(count)
        else:
            chosen = words.size + torch.arange(count)
            with torch.no_grad():
                known = vlm.embed_tokens(torch.arange(words.num_text, device=parameter_of(vlm).device)[None])
            self.embedding = nn.Parameter(torch.randn_like(known[0, :1].expand(count, -1)) * known.std())
            self.output = nn.Parameter(torch.randn_like(self.embedding) * vlm.hidden_size**-0.5)
        self.register_buffer("ids", chosen)

    @property
    def size(self) -> int:
        """The number of language tokens, appended ones included."""
        return self.base_size + (0 if self.embedding is None else len(self.embedding))

    def embed(self, vlm: VLM, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        if self.embedding is None:
            return vlm.embed_tokens(ids)
        old = vlm.embed_tokens(ids.clamp_max(self.base_size - 1))
        new = functional.embedding((ids - self.base_size).clamp_min(0), self.embedding).to(old)
        return torch.where((ids >= self.base_size)[..., None], new, old)

    def logits(self, vlm: VLM, hidden: Float[Tensor, "b l d"]) -> Float[Tensor, "b l v"]:
        logits = vlm.logits(hidden)
        if self.output is None:
            return logits
        return torch.cat((logits, functional.linear(hidden, self.output.to(hidden)).to(logits)), dim=-1)


class WritesTokens(Protocol):
    """What embeds and predicts tokens: `ActionTokens`, or the backbone's own words alone."""

    def embed(self, vlm: VLM, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]: ...

    def logits(self, vlm: VLM, hidden: Float[Tensor, "b l d"]) -> Float[Tensor, "b l v"]: ...


@dataclass(frozen=True)
class Unread:
    """What an answer stands behind, where both are read together."""

    observation: Observation


class LanguageDecoder:
    """A `librobot.heads.base.Decoder` over a backbone's `Context`, which holds the last hidden states.

    With `pack` what is learned is read in rows of several samples, without padding (`librobot.nn.packing`);
    `pack_length` is the length of a row, None the shortest that is full enough. Raises ValueError where the
    backbone's attention cannot keep the samples apart.
    """

    def __init__(
        self,
        vlm: VLM,
        tokens: WritesTokens,
        start: Sequence[int] = (),
        *,
        pack: bool = False,
        pack_length: int | None = None,
    ) -> None:
        check_packs(vlm, pack, pack_length)
        self.vlm, self.tokens, self.start = vlm, tokens, tuple(start)
        self.pack, self.pack_length = pack, pack_length

    def read(self, observation: Observation) -> Context | Unread:
        """What answers are learned behind; decoding needs the backbone's context."""
        return Unread(observation) if self.pack else self.vlm(observation, layers=(-1,))

    def __call__(self, tokens: Int[Tensor, "b l"], context: Context | Unread) -> Float[Tensor, "b l v"]:
        everything = torch.ones_like(tokens, dtype=torch.bool)
        return self.tokens.logits(self.vlm, self.hidden(tokens, everything, context))

    def of_real(
        self, tokens: Int[Tensor, "b l"], real: Bool[Tensor, "b l"], context: Context | Unread
    ) -> Float[Tensor, "n v"]:
        return self.tokens.logits(self.vlm, self.hidden(tokens, real, context)[real])

    def hidden(
        self, tokens: Int[Tensor, "b l"], real: Bool[Tensor, "b l"], context: Context | Unread
    ) -> Float[Tensor, "b l d"]:
        """The states that predict the real tokens; arbitrary ones where a token is not."""
        given = torch.cat((self.starts(len(tokens), tokens.device), tokens[:, :-1]), dim=1)
        if isinstance(context, Unread):
            x = self.tokens.embed(self.vlm, given)
            told = torch.cat(
                (torch.ones_like(given[:, : len(self.start)], dtype=torch.bool), real[:, 1:]), dim=1
            )
            hidden = self.vlm.read_packed(context.observation, x, told, length=self.pack_length)
        else:
            hidden = last_of(context)
            if given.shape[1]:
                after = self.vlm.extend(context, self.tokens.embed(self.vlm, given)).hidden
                hidden = torch.cat((hidden, after), dim=1)
        return hidden[:, len(self.start) :]

    def begin(self, context: Context) -> Writing:
        return Writing(self, context)

    def starts(self, count: int, device: torch.device) -> Int[Tensor, "b n"]:
        return repeat(torch.tensor(self.start, dtype=torch.long, device=device), "n -> b n", b=count)


class Writing:
    """Decoding under way: the cache of prefix and answer so far."""

    def __init__(self, decoder: LanguageDecoder, context: Context) -> None:
        self.decoder, self.context = decoder, context

    def __call__(self, tokens: Int[Tensor, " b"] | None, /) -> Float[Tensor, "b v"]:
        decoder = self.decoder
        mask = self.context.mask
        given = decoder.starts(len(mask), mask.device) if tokens is None else tokens[:, None]
        if given.shape[1]:
            x = decoder.tokens.embed(decoder.vlm, given)
            self.context = decoder.vlm.extend(self.context, x)
        return decoder.tokens.logits(decoder.vlm, last_of(self.context))[:, 0]


def last_of(context: Context) -> Float[Tensor, "b 1 d"]:
    """The hidden state of each sample's last real token."""
    mask = context.mask[:, -context.hidden.shape[1] :]
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)
    return context.hidden[torch.arange(len(last), device=last.device), last][:, None]


def writing_vlm(vlm: VLM | None, framework: str) -> VLM:
    """The backbone itself. Raises ValueError where it cannot write behind its context."""
    if vlm is None or not vlm.has_cache:
        raise ValueError(
            f"{framework} writes its actions with the backbone's language model, behind the prompt, and "
            f"{type(vlm).__name__} is an encoder and a decoder without a cache to write behind; take a "
            f"decoder-only backbone, such as vlm=paligemma or vlm=qwen2vl"
        )
    if not getattr(vlm, "final_norm", True):
        raise ValueError(
            f"{framework} needs the hidden states that predict tokens, found vlm.final_norm=false; leave it "
            f"at true"
        )
    return vlm


def check_packs(vlm: VLM, pack: bool, length: int | None) -> None:
    """Raises ValueError where the backbone cannot read packed rows, and for a length without effect."""
    if not pack:
        if length is not None:
            raise ValueError(
                f"pack_length={length} has no effect with pack=false; set pack=true, or leave it out"
            )
        return
    if length is not None and length < 1:
        raise ValueError(f"pack_length must be at least 1 token, found {length}")
    if vlm.cannot_pack is not None:
        raise ValueError(
            f"pack=true puts several samples into a row, and {vlm.cannot_pack}; take vlm=tiny or a "
            f"decoder-only backbone (vlm=qwen2vl, paligemma, ...) with vlm.attn_implementation=sdpa or "
            f"eager, or pack=false"
        )


def write_in_words(
    head: ActionHead, tokens: ActionTokens, *, after: Sequence[int], lead: Sequence[int] = (), **options: Any
) -> None:
    """Let the head's tokenizer speak the language model's vocabulary from now on."""
    head.tokenizer = WrittenTokens(  # type: ignore[assignment]  # a Tensor or a Module, as nn.Module's types say
        head.tokenizer,  # type: ignore[arg-type]
        lambda: tokens.ids,
        tokens.size,
        after=after,
        lead=lead,
        **options,
    )


def number_of_tokens(head: ActionHead) -> int:
    """How many language tokens the head's tokenizer takes, its stop token aside."""
    tokenizer: Any = head.tokenizer
    return tokenizer.vocabulary - (getattr(tokenizer, "stop", None) is not None)


def parameter_of(module: nn.Module) -> Tensor:
    return next(module.parameters())


def answer_loss(
    decoder: LanguageDecoder, context: Context | Unread, ids: Int[Tensor, "b l"], real: Bool[Tensor, "b l"]
) -> Float[Tensor, " b"]:
    """Each sample's mean cross-entropy of an answer's real tokens."""
    of_real = functional.cross_entropy(
        decoder.of_real(ids, real, context).float(), ids[real], reduction="none"
    )
    error = of_real.new_zeros(ids.shape).masked_scatter(real, of_real)
    return error.sum(dim=1) / real.sum(dim=1).clamp_min(1)


def token_lengths(
    framework: Framework,
    prompts: Sequence[str],
    state: Float[Tensor, "n t s"],
    actions: Float[Tensor, "n k a"],
) -> Int[np.ndarray, "n 2"]:
    """How many tokens the prompt and the answer of each sample take, pictures and special tokens aside.
    `actions` are in physical units. Answers of bins are all of one length, 0 here.
    """
    vlm = framework.vlm
    assert vlm is not None
    writer = framework.prompt_writer()
    texts = list(prompts) if writer is None else writer(list(prompts), state)
    tokenize = vlm.vocabulary.tokenize
    of_text = {text: len(tokenize(text)) for text in set(texts)}
    lengths = np.array([[of_text[text], 0] for text in texts], np.int64)
    tokenizer: Any = framework.head.tokenizer
    if getattr(tokenizer, "stop", None) is not None:
        device = parameter_of(framework).device
        chunks = framework.normalized_chunks(actions.to(device))
        lengths[:, 1] = tokenizer.encode(chunks)[1].sum(dim=1).cpu().numpy()
    return lengths
