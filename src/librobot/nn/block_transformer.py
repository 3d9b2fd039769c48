"""Octo's transformer: a task, then steps in time, each with readout tokens that read and are not read
(Octo Model Team 2024, section III-A; code octo `block_transformer.py`)."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from librobot.nn.masks import block_wise


def readout_mask(
    num_task: int, num_seen: int, num_readouts: int, num_steps: int, device: torch.device | None = None
) -> Bool[Tensor, "l l"]:
    """Who sees whom in [task | step 0: seen, readouts | step 1: seen, readouts | ...].

    Task tokens (t) see the task; what was seen at a step (o) sees the task and the observations of its own
    and of earlier steps; readouts (r) see the same and the readouts up to theirs. With 2 task tokens, 2 seen,
    1 readout and 2 steps:

             t t o o r o o r
        t    x x . . . . . .
        t    x x . . . . . .
        o    x x x x . . . .
        o    x x x x . . . .
        r    x x x x x . . .
        o    x x x x . x x .
        o    x x x x . x x .
        r    x x x x x x x x
    """
    size = num_seen + num_readouts
    index = torch.arange(num_steps * size, device=device)
    task = index.new_zeros(num_task)
    positions = torch.cat((task, size + index))[None]  # block 0 is the task, block 1 + i is step i
    readout = torch.cat((task > 0, index % size >= num_seen))
    return block_wise(positions, positions, size)[0] & (~readout[None, :] | readout[:, None])


class Block(nn.Module):
    """Pre-norm transformer block with biases everywhere, as in ViT (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int, num_heads: int, feedforward_width: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, feedforward_width),
            nn.GELU(approximate="tanh"),
            nn.Dropout(dropout),
            nn.Linear(feedforward_width, width),
            nn.Dropout(dropout),
        )
        self.dropout = nn.Dropout(dropout)
        for linear in (self.out_proj, self.mlp[0], self.mlp[3]):
            assert isinstance(linear, nn.Linear)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for kernel in self.qkv_proj.weight.chunk(3):
            nn.init.xavier_uniform_(kernel.detach())
        nn.init.zeros_(self.qkv_proj.bias)

    def forward(self, x: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l l"]) -> Float[Tensor, "b l d"]:
        qkv = self.qkv_proj(self.attention_norm(x))
        queries, keys, values = rearrange(qkv, "b l (n h e) -> n b h l e", n=3, h=self.num_heads)
        seen = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None])
        x = x + self.dropout(self.out_proj(rearrange(seen, "b h l e -> b l (h e)")))
        return x + self.mlp(self.mlp_norm(x))


class BlockTransformer(nn.Module):
    """Layers over a task and steps; returns the readouts of every step."""

    def __init__(
        self, width: int, num_layers: int, num_heads: int, feedforward_width: int, dropout: float
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads, found {width} and {num_heads}")
        self.blocks = nn.ModuleList(
            Block(width, num_heads, feedforward_width, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(
        self,
        task: Float[Tensor, "b p d"],
        task_real: Bool[Tensor, "b p"],
        seen: Float[Tensor, "b t n d"],
        seen_real: Bool[Tensor, "b t n"],
        readouts: Float[Tensor, "b t r d"],
    ) -> Float[Tensor, "b t r d"]:
        """Tokens with their positions added. Nobody sees a token that is not real."""
        num_steps, num_readouts = readouts.shape[1:3]
        steps = torch.cat((seen, readouts), dim=2)
        steps_real = torch.cat((seen_real, seen_real.new_ones(readouts.shape[:3])), dim=2)
        x = torch.cat((task, rearrange(steps, "b t n d -> b (t n) d")), dim=1)
        real = torch.cat((task_real, rearrange(steps_real, "b t n -> b (t n)")), dim=1)
        order = readout_mask(task.shape[1], seen.shape[2], num_readouts, num_steps, x.device)
        itself = torch.eye(len(order), dtype=torch.bool, device=x.device)  # no row of padding is empty
        mask = (order & real[:, None, :]) | itself
        for block in self.blocks:
            x = block(x, mask)
        steps = rearrange(self.norm(x)[:, task.shape[1] :], "b (t n) d -> b t n d", t=num_steps)
        return steps[:, :, -num_readouts:]


class AttentionPool(nn.Module):
    """Several tokens as one vector, read by one learned probe (Zhai et al. 2022, appendix F; octo's
    `MAPHead`)."""

    def __init__(self, width: int, num_heads: int = 8) -> None:
        super().__init__()
        heads = num_heads if width % num_heads == 0 else 1
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        nn.init.xavier_uniform_(self.probe)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b d"]:
        read, _ = self.attention(self.probe.expand(len(x), -1, -1), x, x, need_weights=False)
        return (read + self.mlp(self.norm(read)))[:, 0]
