"""lerobot's pi0-FAST with the sizes, weights and tokens of ours.

Its vocabulary is the backbone's and, behind it, the action tokens that ours appends to a small one. All
samples have one answer: lerobot averages over a batch's tokens, librobot over each sample's. Both read texts
and answers padded to the longest; lerobot's own steps pad them to 200 and 256 tokens. To sample, lerobot
writes as many tokens as ours needs for the chunk, without the FAST decoding that ours does as well.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from jaxtyping import Float
from torch import Tensor, nn

from librobot.bench._lerobot_backbones import policy_features
from librobot.interchange.lerobot.pi0_fast import weight_map
from librobot.types import Batch

EMBEDDING, OUTPUT = "vlm.model.model.language_model.embed_tokens.weight", "vlm.model.lm_head.weight"
NUMBER = "action.number_written"
APPENDED = ("tokens.embedding", "tokens.output")


def chunks(count: int, horizon: int, dims: int) -> Float[Tensor, "count horizon dims"]:
    """Smooth motions in [-1, 1], as robots make them: what FAST is made for."""
    generator = torch.Generator().manual_seed(0)
    speed, phase = (
        torch.rand(count, 1, dims, generator=generator) * torch.tensor(scale) for scale in (0.2, 6.3)
    )
    return torch.sin(torch.arange(horizon)[:, None] * speed + phase)


def pi0_fast(ours: Any) -> nn.Module:
    """lerobot's policy, whose sizes its code fixes: they are put in while it is built."""
    from lerobot.policies.pi0_fast import modeling_pi0_fast as module
    from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
    from lerobot.policies.pi_gemma import PaliGemmaForConditionalGenerationWithPiGemma

    config = copy.deepcopy(ours.vlm.model.config)
    config.text_config.vocab_size = ours.tokens.size
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False

    class Sized(module.PI0FastPaliGemma):
        def __init__(self, *args: Any, **options: Any) -> None:
            nn.Module.__init__(self)
            self.paligemma = PaliGemmaForConditionalGenerationWithPiGemma(config=config)

    # Its end token is never found: how many tokens it writes is said.
    words = SimpleNamespace(bos_token_id=ours.vlm.vocabulary.begin, convert_tokens_to_ids=lambda text: -1)
    side = config.vision_config.image_size
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, "PI0FastPaliGemma", Sized))
        for name in ("AutoTokenizer", "AutoProcessor"):
            source = SimpleNamespace(from_pretrained=lambda *_, **__: words)
            stack.enter_context(mock.patch.object(module, name, source))
        policy = module.PI0FastPolicy(
            PI0FastConfig(
                **policy_features(ours.spec),
                chunk_size=ours.horizon,
                n_action_steps=ours.horizon,
                max_state_dim=ours.spec.state_dim,
                max_action_dim=ours.action_width,
                image_resolution=(side, side),
                device="cpu",
            )
        )
    policy.load_state_dict(weight_map().to_theirs(whole(ours), "ours"), strict=True)
    return policy


def whole(ours: Any) -> dict[str, Tensor]:
    """Our weights with input and output embeddings apart, the appended tokens' rows among them. Gemma scales
    what is looked up."""
    weights = dict(ours.state_dict())
    weights.setdefault(OUTPUT, weights[EMBEDDING])
    scales = (getattr(ours.vlm.model.get_input_embeddings(), "embed_scale", 1.0), 1.0)
    for name, appended, scale in zip((EMBEDDING, OUTPUT), APPENDED, scales, strict=True):
        if appended in weights:
            weights[name] = torch.cat((weights[name], weights.pop(appended) / scale))
    return weights


def answers(ours: Any, data: Batch) -> dict[str, Tensor]:
    """The tokens of the batch's chunks, behind the one that starts an answer; in evaluation mode also how
    many ours writes."""
    tokens, real = ours.head.tokenizer.encode(ours.normalized_actions(data))
    first = tokens.new_full((len(tokens), 1), ours.vlm.vocabulary.begin)
    return {
        "action.tokens": torch.cat((first, tokens), dim=1),
        "action.token_mask": torch.cat((torch.ones_like(first, dtype=torch.bool), real), dim=1),
        **({} if ours.training else {NUMBER: torch.tensor(number_written(ours, data))}),
    }


def number_written(ours: Any, data: Batch) -> int:
    """How many tokens ours writes for the chunks of a batch."""
    begin, count = ours.decoder.begin, 0

    def counted(context: Any) -> Any:
        writing = begin(context)

        def write(tokens: Any) -> Any:
            nonlocal count
            count += 1
            return writing(tokens)

        return write

    with mock.patch.object(ours.decoder, "begin", counted), torch.inference_mode():
        ours.sample_actions(data.observation)
    return count


def sample(policy: Any, batch: dict[str, Tensor]) -> Tensor:
    """Tokens, with the cache of keys and values."""
    count = int(batch[NUMBER])
    pictures, masks = policy._preprocess_images(batch)
    language = (batch[f"observation.language.{name}"] for name in ("tokens", "attention_mask"))
    return policy.model.sample_actions_fast_kv_cache(pictures, masks, *language, max_decoding_steps=count)
