"""The action expert of pi0 (Black et al. 2024, section IV): a second, narrower transformer.

In layer i its tokens attend to the backbone's keys and values of layer i beside their own. The backbone
never sees them, so what stands before a block of expert tokens is computed once, whatever is done with the
block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from librobot.nn.attention import Angles, Attention, GatedMLP, block_plan, grouped_attention
from librobot.nn.norms import AdaptiveRMSNorm, gated_sum
from librobot.nn.positions import rotary_angles
from librobot.vlms.base import Context, Geometry

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass
class Place:
    """Where a block of q new tokens stands behind l earlier ones, and what it attends to in each layer: all
    real tokens before it, and itself as a whole.

    `bias` is added to the scores. `keys` and `values` are the earlier tokens'. With `room`, they end in q
    unused tokens, into which a block writes its own: nothing is then allocated or copied however often other
    tokens take the same place. Gradients need tensors that stay as they are, and so no room.
    """

    angles: Angles
    bias: Float[Tensor, "b 1 1 l+q"]
    keys: tuple[Float[Tensor, "b h m e"], ...]
    values: tuple[Float[Tensor, "b h m e"], ...]
    room: bool

    def join(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the earlier tokens and of the block."""
        before, after = (self.keys[layer], keys), (self.values[layer], values)
        if not self.room:
            return torch.cat(before, dim=2), torch.cat(after, dim=2)
        for held, own in (before, after):
            held[:, :, -own.shape[2] :] = own
        return self.keys[layer], self.values[layer]


class ExpertBlock(nn.Module):
    """Gemma's block, attending to a cache as well; with a condition its norms follow it and its branches are
    gated (pi0.5)."""

    tensor_plan = block_plan()

    def __init__(
        self, width: int, mlp_width: int, geometry: Geometry, condition_width: int, gate_bias: float
    ) -> None:
        super().__init__()
        self.attention_norm = AdaptiveRMSNorm(width, condition_width, gate_bias=gate_bias)
        self.attention = Attention(width, geometry.num_heads, geometry.num_kv_heads, geometry.head_dim)
        self.mlp_norm = AdaptiveRMSNorm(width, condition_width, gate_bias=gate_bias)
        self.mlp = GatedMLP(width, mlp_width, activation="gelu")

    def forward(
        self, x: Float[Tensor, "b q d"], place: Place, layer: int, condition: Float[Tensor, "b e"] | None
    ) -> tuple[Float[Tensor, "b q d"], Float[Tensor, "b h m e"], Float[Tensor, "b h m e"]]:
        """The block's output, and the keys and values that it attended to."""
        normed, gate = self.attention_norm(x, condition)
        queries, keys, values = self.attention.queries_keys_values(normed, place.angles)
        keys, values = place.join(layer, keys, values)
        attended = grouped_attention(queries, keys, values, place.bias)
        x = gated_sum(x, self.attention.output(attended), gate)
        normed, gate = self.mlp_norm(x, condition)
        return gated_sum(x, self.mlp(normed), gate), keys, values

    def keys_values(
        self, x: Float[Tensor, "b q d"], angles: Angles
    ) -> tuple[Float[Tensor, "b h q e"], Float[Tensor, "b h q e"]]:
        """Only what other tokens attend to, without a condition."""
        return self.attention.keys_values(self.attention_norm(x)[0], angles)


class ActionExpert(nn.Module):
    """As many layers and heads as the backbone of `geometry` has, of any `width`.

    `condition_width` above 0 makes all norms adaptive (`AdaptiveRMSNorm`).
    """

    layers: Any  # a ModuleList of ExpertBlock

    def __init__(
        self,
        width: int,
        mlp_width: int,
        geometry: Geometry,
        *,
        condition_width: int = 0,
        gate_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.layers = nn.ModuleList(
            ExpertBlock(width, mlp_width, geometry, condition_width, gate_bias)
            for _ in range(geometry.num_layers)
        )
        self.norm = AdaptiveRMSNorm(width, condition_width)
        self.graphs = False

    def compile_as(self, mode: str) -> None:
        """Compile the pass over a block, in one of torch.compile's modes."""
        if mode not in COMPILE_MODES:
            raise ValueError(f"compile must be null or one of {', '.join(COMPILE_MODES)}, found {mode!r}")
        self.graphs = mode in ("reduce-overhead", "max-autotune")
        self.compile(mode=mode)

    def place(self, context: Context, count: int) -> Place:
        """The place of a block of `count` tokens behind `context`, with room where no gradient is wanted."""
        dtype = self.layers[0].attention.k_proj.weight.dtype
        room = not (torch.is_grad_enabled() or self.graphs)  # a CUDA graph must not change its inputs
        positions = context.next_position[:, None] + torch.arange(count, device=context.mask.device)
        seen = functional.pad(context.mask, (0, count), value=True)
        bias = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)
        keys, values = (tuple(x.to(dtype) for x in cache) for cache in (context.keys, context.values))
        if room:
            keys, values = (
                tuple(functional.pad(x, (0, 0, 0, count)) for x in cache) for cache in (keys, values)
            )
        return Place(
            angles=rotary_angles(positions, self.geometry.head_dim, self.geometry.rope_theta),
            bias=bias[:, None, None],
            keys=keys,
            values=values,
            room=room,
        )

    def forward(
        self, x: Float[Tensor, "b q d"], place: Place, condition: Float[Tensor, "b e"] | None = None
    ) -> Float[Tensor, "b q d"]:
        """What the expert makes of a block of tokens in its place, after the final norm."""
        for layer, block in enumerate(self.layers):
            x, _, _ = block(x, place, layer, condition)
        return self.norm(x, condition)[0]

    def extend(self, context: Context, x: Float[Tensor, "b q d"]) -> Context:
        """The context with a block of expert tokens behind it: the counterpart of `VLM.extend`."""
        place, keys, values = self.place(context, x.shape[1]), [], []
        for layer, block in enumerate(self.layers[:-1]):
            x, all_keys, all_values = block(x, place, layer, None)
            keys.append(all_keys)
            values.append(all_values)
        last = self.layers[-1]  # of which nothing but keys and values is read
        own = last.keys_values(x, place.angles)
        all_keys, all_values = place.join(len(self.layers) - 1, *own)
        return replace(
            context,
            keys=(*keys, all_keys),
            values=(*values, all_values),
            mask=functional.pad(context.mask, (0, x.shape[1]), value=True),
            next_position=context.next_position + x.shape[1],
        )
