"""GR00T's tensor names, as NVIDIA publishes them, beside ours."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from librobot.interchange.weights import Rule, WeightMap

BLOCK = {  # of both transformers
    "attn1.to_q.*": "attention.q_proj.*",
    "attn1.to_k.*": "attention.k_proj.*",
    "attn1.to_v.*": "attention.v_proj.*",
    "attn1.to_out.0.*": "attention.o_proj.*",
    "ff.net.0.proj.*": "mlp.0.*",
    "ff.net.2.*": "mlp.3.*",
}
QWEN = (("backbone.model.*", "vlm.model.*"),)
"""N1.7's backbone has transformers' own names in both layouts."""

EAGLE = (
    ("backbone.eagle_model.vision_model.*", "vlm.model.model.vision_tower.*"),
    ("backbone.eagle_model.mlp1.0.*", "vlm.model.model.multi_modal_projector.*"),
    ("backbone.eagle_model.language_model.model.*", "vlm.model.model.language_model.*"),
    ("backbone.eagle_model.language_model.lm_head.*", "vlm.model.lm_head.*"),
)
"""N1.5's backbone is NVIDIA's own class there, a LLaVA here."""

PER_EMBODIMENT = {
    "state_encoder.layer1": "state_encoder.enter",
    "state_encoder.layer2": "state_encoder.leave",
    "action_encoder.W1": "action_encoder.action",
    "action_encoder.W2": "action_encoder.mix",
    "action_encoder.W3": "action_encoder.leave",
    "action_decoder.layer1": "action_decoder.enter",
    "action_decoder.layer2": "action_decoder.leave",
}


DIT, FUSION = "action_head.model.transformer_blocks.*.", "action_head.vl_self_attention.transformer_blocks.*."


def weight_map(*, prefix: str = "", backbone: tuple[tuple[str, str], ...] = QWEN) -> WeightMap:
    """The table of tensor names. `prefix` stands before each of theirs (lerobot: "_groot_model."). `backbone`
    pairs names of the backbone's parts."""
    pairs = [
        *backbone,
        *((f"{DIT}{a}", f"dit.blocks.*.{b}") for a, b in BLOCK.items()),
        (f"{DIT}norm1.linear.*", "dit.blocks.*.norm_attention.linear.*"),
        ("action_head.model.timestep_encoder.timestep_embedder.linear_1.*", "dit.time_mlp.0.*"),
        ("action_head.model.timestep_encoder.timestep_embedder.linear_2.*", "dit.time_mlp.2.*"),
        ("action_head.model.proj_out_2.*", "dit.output_proj.*"),
        ("action_head.vlln.*", "vision_language_norm.*"),
        *((f"{FUSION}{a}", f"fusion.blocks.*.{b}") for a, b in BLOCK.items()),
        (f"{FUSION}norm1.*", "fusion.blocks.*.norm_attention.norm.*"),
        (f"{FUSION}norm3.*", "fusion.blocks.*.norm_mlp.*"),
        *(
            (f"action_head.{a}.{c}", f"{b}.{d}")
            for a, b in PER_EMBODIMENT.items()
            for c, d in (("W", "weight"), ("b", "bias"))
        ),
        ("action_head.position_embedding.weight", "action_positions"),
        ("action_head.future_tokens.weight", "future_tokens"),
    ]
    changed = [
        Rule(f"{prefix}action_head.model.proj_out_1.*", "dit.norm_out.linear.*", _halves, _halves),
        Rule(f"{prefix}action_head.mask_token", "dropped_state", _flat, lambda x: x[None, None]),
    ]
    return WeightMap([*(Rule(f"{prefix}{theirs}", ours) for theirs, ours in pairs), *changed])


def with_tied(theirs: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """N1.7's tensors with both names of the tied embedding: a file may hold it once, by either."""
    names = [f"{prefix}backbone.model.{n}.weight" for n in ("model.language_model.embed_tokens", "lm_head")]
    known = next((theirs[name] for name in names if name in theirs), None)
    return {**({} if known is None else dict.fromkeys(names, known)), **theirs}


def _halves(x: Tensor) -> Tensor:
    """The last norm's shift and scale, which the two layouts keep in opposite orders."""
    return x.roll(len(x) // 2, dims=0)


def _flat(x: Tensor) -> Tensor:
    return x.flatten()
