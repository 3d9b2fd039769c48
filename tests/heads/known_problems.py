"""Conditional distributions of actions whose answer is known, and how far samples are from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from librobot.heads.base import ActionHead
from librobot.networks.base import ContextTokens, Network, Sizes

HORIZON, ACTION_DIM, NUM_CONTEXTS, CONTEXT_WIDTH = 2, 2, 4, 16


TWO_MODES, RING = (0, 1), (2, 3)  # contexts: two of either problem


def centres() -> list[Tensor]:
    """First actions at the centres of each context's modes.

    Contexts 0 and 1: a detour to the left (30%) or to the right (70%), along different axes. Contexts 2 and
    3: circles around the origin of different radius, whose modes are twelve arcs.
    """
    angles = torch.arange(12) * 2 * math.pi / 12
    unit = torch.stack((angles.cos(), angles.sin()), dim=-1)
    detours = [torch.tensor([[-0.6, 0.0], [0.6, 0.0]]), torch.tensor([[0.2, -0.5], [0.2, 0.7]])]
    return [*detours, 0.4 * unit, 0.8 * unit]


def draw(which: Tensor, generator: torch.Generator) -> Tensor:
    """A chunk (k, a) for each context index: two correlated steps, the second mirrors the first."""
    modes = centres()
    right = (torch.rand(len(which), generator=generator) < 0.7).long()
    angle = 2 * math.pi * torch.rand(len(which), generator=generator)
    detour = torch.stack((modes[0], modes[1]))[which.clamp_max(1), right]
    radius = torch.tensor([0.0, 0.0, 0.4, 0.8])[which, None]
    circle = radius * torch.stack((angle.cos(), angle.sin()), dim=-1)
    point = torch.where(which[:, None] < 2, detour, circle)
    chunk = torch.stack((point, -point), dim=1)
    return chunk + 0.08 * torch.randn(chunk.shape, generator=generator)


def of_context(which: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return draw(torch.full((count,), which), generator)


def context_of(which: Tensor) -> ContextTokens:
    """One token that names the context."""
    table = torch.randn(NUM_CONTEXTS, CONTEXT_WIDTH, generator=torch.Generator().manual_seed(0))
    return ContextTokens(
        values=table[which][:, None],
        mask=torch.ones(len(which), 1, dtype=torch.bool),
        features=torch.nn.functional.one_hot(which, NUM_CONTEXTS).float(),
        null=torch.zeros(CONTEXT_WIDTH),
    )


def sizes_for(head: ActionHead) -> Sizes:
    return Sizes.of(head, CONTEXT_WIDTH)


def train(head: ActionHead, network: Network, *, num_steps: int, lr: float = 2e-3) -> None:
    generator = torch.Generator().manual_seed(1)
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    mask = torch.ones(256, HORIZON, dtype=torch.bool)
    for _ in range(num_steps):
        which = torch.randint(NUM_CONTEXTS, (256,), generator=generator)
        actions = draw(which, generator)
        optimizer.zero_grad()
        head.loss(network, context_of(which), actions, mask).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def shares(chunks: Tensor, modes: Tensor) -> Tensor:
    """The share of samples whose first action is nearest to each mode."""
    nearest = torch.cdist(chunks[:, 0], modes).argmin(dim=1)
    return torch.bincount(nearest, minlength=len(modes)) / len(chunks)


def sliced_wasserstein(first: Tensor, second: Tensor) -> float:
    """Mean distance of sorted projections over 256 fixed directions, of two sets of equally many chunks."""
    directions = torch.randn(first[0].numel(), 256, generator=torch.Generator().manual_seed(2))
    directions = directions / directions.norm(dim=0)
    projected = [(chunks.flatten(1) @ directions).sort(dim=0).values for chunks in (first, second)]
    return (projected[0] - projected[1]).abs().mean().item()
