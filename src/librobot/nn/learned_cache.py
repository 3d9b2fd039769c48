"""Keys and values for a denoiser, made from a backbone's hidden states."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from librobot.nn.positions import apply_rotary, rotary_angles


class LearnedCache(nn.Module):
    """For backbones without a cache of their own: each layer of a denoiser gets its own linear projections.

    A token's position is the number of real tokens before it, so that a denoiser's tokens go on at the
    context's `next_position`.
    """

    def __init__(
        self, width: int, *, num_layers: int, num_kv_heads: int, head_dim: int, rope_theta: float
    ) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = head_dim, rope_theta
        inner = num_kv_heads * head_dim
        self.k_proj = nn.ModuleList(nn.Linear(width, inner, bias=False) for _ in range(num_layers))
        self.v_proj = nn.ModuleList(nn.Linear(width, inner, bias=False) for _ in range(num_layers))

    def forward(
        self, hidden: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"]
    ) -> tuple[tuple[Float[Tensor, "b h l e"], ...], tuple[Float[Tensor, "b h l e"], ...]]:
        """Rotated keys, and values, of every layer; `mask` is True on real tokens."""
        hidden = hidden.to(next(self.parameters()).dtype)  # the backbone's own may differ (vlm.dtype)
        angles = rotary_angles(mask.cumsum(dim=1) - 1, self.head_dim, self.rope_theta)
        keys = tuple(apply_rotary(self.heads(project(hidden)), angles) for project in self.k_proj)
        values = tuple(self.heads(project(hidden)) for project in self.v_proj)
        return keys, values

    def heads(self, x: Float[Tensor, "b l w"]) -> Float[Tensor, "b h l e"]:
        return rearrange(x, "b l (h e) -> b h l e", e=self.head_dim)
