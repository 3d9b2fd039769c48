"""System 2 of Helix (Figure 2025): what a backbone sees, as one latent vector, and a plan in words before it.

prefix   one camera's picture, the instruction: the backbone's own prompt
plan     (start, word, word, ...)   written by the backbone's language model; an option
end      (state, query)             the last hidden state of the query is the latent, once projected
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from librobot.errors import LibrobotError
from librobot.nn.pooling import mean_of_real
from librobot.types import Observation
from librobot.vlms.base import VLM, Context

START = 0.02
"""Deviation of the learned tokens at the start, as of embeddings in published backbones. A query as large as
what it reads in a whole layer would drown it: latents would begin almost the same for every observation."""


@dataclass
class Plan:
    """Token ids of a text for each sample, ended by the vocabulary's end; which are real."""

    ids: Int[Tensor, "b q"]
    real: Bool[Tensor, "b q"]


class SlowThought(nn.Module):
    """The few weights of system 2 beside its backbone, which is handed to each call.

    A backbone without a cache gives the mean of its hidden states in place of the query's, beside the state.
    """

    def __init__(self, vlm: VLM, state_dim: int, latent_dim: int, *, plans: bool) -> None:
        super().__init__()
        if plans and not vlm.has_cache:
            raise ValueError(
                f"plan needs a backbone that can write behind its prompt, and {type(vlm).__name__} has no "
                f"cache; take a decoder-only one such as vlm=qwen25vl or vlm=tiny, or leave plan=false"
            )
        self.state_proj = nn.Linear(state_dim, vlm.hidden_size) if state_dim else None
        self.latent_proj = nn.Linear(vlm.hidden_size, latent_dim)
        if vlm.has_cache:
            self.query = nn.Parameter(START * torch.randn(vlm.hidden_size))
        self.plan_start = nn.Parameter(START * torch.randn(vlm.hidden_size)) if plans else None

    def latent(self, vlm: VLM, prefix: Context, state: Float[Tensor, "b s"]) -> Float[Tensor, "b z"]:
        """From a prefix, with or without a plan behind it."""
        b = len(prefix.mask)
        state = state.to(self.latent_proj.weight.dtype)
        own = [] if self.state_proj is None else [self.state_proj(state)]
        if vlm.has_cache:
            end = torch.stack([*own, repeat(self.query, "d -> b d", b=b)], dim=1)
            hidden = vlm.extend(prefix, end.to(prefix.hidden.dtype)).hidden[:, -1]
        else:
            hidden = mean_of_real(prefix.hidden, prefix.mask) + (own[0] if own else 0)
        return self.latent_proj(hidden.to(self.latent_proj.weight.dtype))

    def read_plan(self, vlm: VLM, prefix: Context, plan: Plan) -> tuple[Context, Float[Tensor, " b"]]:
        """The prefix with the plan behind it, and each sample's cross entropy (the mean over its tokens; 0
        where it has none)."""
        start = self._start(vlm, prefix)
        x = torch.cat((start, vlm.embed_tokens(plan.ids).to(start)), dim=1)
        real = torch.cat((plan.real.any(dim=1, keepdim=True), plan.real), dim=1)
        read = vlm.extend(prefix, x, real=real)
        logits = vlm.logits(read.hidden[:, :-1]).float()
        entropy = functional.cross_entropy(logits.mT, plan.ids, reduction="none") * plan.real
        return read, entropy.sum(dim=1) / plan.real.sum(dim=1).clamp_min(1)

    def write_plan(self, vlm: VLM, prefix: Context, max_tokens: int) -> Plan:
        """The likeliest tokens, one after the other, until every sample has ended."""
        end = vlm.vocabulary.end
        read = vlm.extend(prefix, self._start(vlm, prefix))
        ids: list[Tensor] = []
        real: list[Tensor] = []
        going = torch.ones(len(prefix.mask), dtype=torch.bool, device=prefix.mask.device)
        while len(ids) < max_tokens:
            chosen = vlm.logits(read.hidden[:, -1]).argmax(dim=-1)
            ids.append(torch.where(going, chosen, end))
            real.append(going)
            going = going & (chosen != end)
            if len(ids) == max_tokens or not bool(going.any()):
                break
            read = vlm.extend(read, vlm.embed_tokens(chosen[:, None]), real=real[-1][:, None])
        return Plan(torch.stack(ids, dim=1), torch.stack(real, dim=1))

    def _start(self, vlm: VLM, prefix: Context) -> Float[Tensor, "b 1 d"]:
        assert self.plan_start is not None
        return repeat(self.plan_start.to(prefix.hidden.dtype), "d -> b 1 d", b=len(prefix.mask))


def tokenized(vlm: VLM, texts: list[str], max_tokens: int, device: torch.device) -> Plan:
    """Plans as token ids; an empty text is none. Raises LibrobotError where one is too long."""
    end = vlm.vocabulary.end
    rows = [[*vlm.vocabulary.tokenize(text), end] if text.strip() else [] for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if len(row) > max_tokens:
            raise LibrobotError(
                f"a plan may have framework.max_plan_tokens={max_tokens} tokens, found {len(row)}: {text!r}"
            )
    length = max(1, *(len(row) for row in rows))
    ids = torch.tensor([row + [end] * (length - len(row)) for row in rows], device=device)
    sizes = torch.tensor([len(row) for row in rows], device=device)
    return Plan(ids, torch.arange(length, device=device) < sizes[:, None])


def in_words(vlm: VLM, plan: Plan) -> list[str]:
    """What a plan says."""
    end = vlm.vocabulary.end
    return [
        vlm.vocabulary.detokenize([id for id, real in zip(*pair, strict=True) if real and id != end]).strip()
        for pair in zip(plan.ids.tolist(), plan.real.tolist(), strict=True)
    ]


def one_step(observation: Observation, steps: Int[Tensor, " b"]) -> Observation:
    """Of each sample's window the one step that is asked for."""
    rows = torch.arange(len(steps), device=steps.device)
    return Observation(
        images={name: image[rows, steps][:, None] for name, image in observation.images.items()},
        image_mask=observation.image_mask,
        state=observation.state[rows, steps][:, None],
        prompt=observation.prompt,
        inputs=observation.inputs,
        embodiment=observation.embodiment,
    )
