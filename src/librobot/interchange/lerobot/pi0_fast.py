"""lerobot's pi0_fast: PaliGemma whose language model writes FAST tokens."""

from __future__ import annotations

from librobot.interchange.weights import Rule, WeightMap

PREFIX = "model.paligemma_with_expert.paligemma."


def weight_map(*, tied: bool = False) -> WeightMap:
    """`tied` where input and output embeddings are one tensor; lerobot trains two."""
    rules = [Rule(f"{PREFIX}*", "vlm.model.*")]
    if not tied:
        return WeightMap(rules, absent=("normalizer.*", "tokens.ids"))
    output, given = f"{PREFIX}lm_head.weight", f"{PREFIX}model.language_model.embed_tokens.weight"
    return WeightMap(
        rules, copies={output: given}, absent=("normalizer.*", "tokens.ids", "vlm.model.lm_head.weight")
    )
