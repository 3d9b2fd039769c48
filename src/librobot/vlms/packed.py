"""A prefix and what is written behind it as one sequence, of which several share a row.

    sample    [ pictures and prompt, without padding and absent cameras | tokens behind them ]

One pass over packed rows gives what `VLM.forward` and then `VLM.extend` give over padded ones: prefix tokens
see each other as the backbone has it, later ones see the prefix and what stands before them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from librobot.errors import LibrobotError
from librobot.nn.packing import Packing, pack, packed_mask, plan_packing, take
from librobot.types import Observation

if TYPE_CHECKING:
    from librobot.vlms.pretrained import PretrainedVLM

ATTENTION = ("sdpa", "eager")
"""transformers' implementations that take a mask of pairs of tokens for each row."""


class PackedSamples:
    """`mask` says which prefix tokens are real, `real` which of those behind; `causal` is how the prefix sees
    itself, `length` that of a row (None: chosen)."""

    def __init__(
        self, mask: Bool[Tensor, "b l"], real: Bool[Tensor, "b q"], *, causal: bool, length: int | None
    ) -> None:
        self.mask, self.real, self.causal = mask, real, causal
        self.packing: Packing = plan_packing(torch.cat((mask, real), dim=1), length)

    def join(self, prefix: Tensor, behind: Tensor) -> Tensor:
        """What prefix (b, l, ...) and later tokens (b, q, ...) have, in packed rows (r, c, ...)."""
        return pack(torch.cat((prefix, behind.to(prefix.dtype)), dim=1), self.packing)

    def positions(
        self, prefix: Int[Tensor, "*axes b l"], next_position: Int[Tensor, " b"]
    ) -> Int[Tensor, "*axes r c"]:
        """Each token's position, on all axes that the prefix has: it restarts with every sample."""
        behind = (next_position[:, None] + self.real.long().cumsum(dim=1) - 1).clamp_min(0)
        if prefix.ndim == 2:
            return self.join(prefix, behind)
        return torch.stack([self.join(axis, behind) for axis in prefix])

    def visible(self) -> Bool[Tensor, "r c c"]:
        num_prefix, total = self.mask.shape[1], self.packing.place.shape[1]
        order = torch.arange(total, device=self.mask.device)
        blocks = order if self.causal else (order - num_prefix + 1).clamp_min(0)
        return packed_mask(self.packing, blocks.expand(len(self.mask), -1))

    def answers(self, hidden: Float[Tensor, "r c d"]) -> Float[Tensor, "b m d"]:
        """The states of each sample's last prefix token and of all behind it (m = 1 + q)."""
        place, num_prefix = self.packing.place, self.mask.shape[1]
        last = num_prefix - 1 - self.mask.flip(1).int().argmax(dim=1, keepdim=True)
        return take(hidden, torch.cat((place.gather(1, last), place[:, num_prefix:]), dim=1))


def why_not_packed(vlm: PretrainedVLM) -> str | None:
    kind = vlm.text_config._attn_implementation
    if not vlm.has_cache:
        return f"{type(vlm).__name__} is an encoder and a decoder, and nothing is written behind its prefix"
    if kind not in ATTENTION:
        return f"vlm.attn_implementation={kind} takes no mask of pairs of tokens"
    return None


def read_packed(
    vlm: PretrainedVLM,
    observation: Observation,
    x: Float[Tensor, "b q d"],
    real: Bool[Tensor, "b q"],
    length: int | None,
) -> Float[Tensor, "b m d"]:
    """`VLM.read_packed` of one of transformers' models. It embeds the padded prefix and the pictures as it
    always does; what then enters its language model is exchanged for packed rows."""
    inputs, mask = vlm._inputs(observation)
    samples = PackedSamples(mask, real, causal=vlm.causal, length=length)
    check_window(vlm, samples)
    padded_positions = vlm.model_positions(inputs["position_ids"])
    positions = samples.positions(padded_positions, inputs["next_position"])
    visible = samples.visible()
    hidden = torch.zeros_like(visible, dtype=x.dtype).masked_fill_(~visible, torch.finfo(x.dtype).min)

    def exchange(_: nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        packed = {
            "inputs_embeds": samples.join(given["inputs_embeds"], x),
            "attention_mask": hidden[:, None],
            "position_ids": positions,
            "past_key_values": None,
        }
        return args, vlm.packed_inputs({**given, **packed}, samples)

    entering = vlm.text.register_forward_pre_hook(exchange, with_kwargs=True)
    try:
        out = vlm.model.model(
            input_ids=inputs["input_ids"],
            attention_mask=vlm.prefix_mask(mask),
            position_ids=padded_positions,
            use_cache=False,
            **vlm.text_inputs(inputs),
            **vlm._pictures(observation),
        )
    finally:
        entering.remove()
    return samples.answers(out.last_hidden_state)


def check_window(vlm: PretrainedVLM, samples: PackedSamples) -> None:
    """Layers with a sliding window would have another mask for samples that are longer than it."""
    config = vlm.text_config
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return
    longest = int((samples.mask.sum(dim=1) + samples.real.sum(dim=1)).max())
    if longest > config.sliding_window:
        raise LibrobotError(
            f"framework.pack: a sample has {longest} tokens, more than the {config.sliding_window} that this "
            f"backbone's layers with a sliding window see; set framework.pack=false"
        )
