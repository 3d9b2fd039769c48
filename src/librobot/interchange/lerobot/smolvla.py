"""lerobot's SmolVLA (`"type": "smolvla"`)."""

from __future__ import annotations

from librobot.interchange.weights import Rule, WeightMap

BOTH = "model.vlm_with_expert."
LAYER = {  # of the expert
    "input_layernorm.*": "attention_norm.*",
    "self_attn.*": "attention.*",
    "post_attention_layernorm.*": "mlp_norm.*",
    "mlp.gate_proj.*": "mlp.gate.*",
    "mlp.up_proj.*": "mlp.up.*",
    "mlp.down_proj.*": "mlp.down.*",
}


def weight_map() -> WeightMap:
    """The table of tensor names."""
    return WeightMap(
        [
            Rule(f"{BOTH}vlm.*", "vlm.model.*"),
            *(Rule(f"{BOTH}lm_expert.layers.*.{a}", f"expert.*.{b}") for a, b in LAYER.items()),
            Rule(f"{BOTH}lm_expert.norm.*", "expert_norm.*"),
            Rule("model.action_time_mlp_in.*", "action_time_mlp.0.*"),
            Rule("model.action_time_mlp_out.*", "action_time_mlp.2.*"),
            *(
                Rule(f"model.{name}.*", f"{name}.*")
                for name in ("state_proj", "action_in_proj", "action_out_proj")
            ),
        ]
    )
