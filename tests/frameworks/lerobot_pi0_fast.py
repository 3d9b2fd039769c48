"""lerobot's PI0FastPolicy at a size that a test can afford, over tokenizers that need no download."""

from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PaliGemmaConfig, SiglipImageProcessor
from transformers import PreTrainedTokenizerFast as FastTokenizer

import tiny_models

SPECIAL = ["<pad>", "<eos>", "<bos>", "<image>"]
NUM_TEXT = 4096  # large enough to give up as many as FAST takes here
PICTURE = 28


def text_tokenizer(ends_texts: bool = False) -> FastTokenizer:
    """Bytes and fillers; with `ends_texts` it appends the end, as PaliGemma's does with add_eos_token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"filler{i}" for i in range(NUM_TEXT - len(alphabet)))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    if ends_texts:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <eos>", special_tokens=[("<eos>", tokenizer.token_to_id("<eos>"))]
        )
    return FastTokenizer(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


def model_config() -> PaliGemmaConfig:
    ids = {f"{name}_token_id": NUM_TEXT + i for i, name in enumerate(("pad", "eos", "bos"))}
    made = PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 144,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": PICTURE,
            "patch_size": 14,
            "projection_dim": 64,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "gemma",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "vocab_size": NUM_TEXT + 64,
            "tie_word_embeddings": False,
            **ids,
        },
        image_token_id=NUM_TEXT + 3,
        projection_dim=64,
        hidden_size=64,
        tie_word_embeddings=False,
        **ids,
    )
    return made


def backbone_folder(folder) -> str:
    """What `vlm=paligemma vlm.checkpoint=FOLDER` reads, with random weights."""
    from transformers import PaliGemmaForConditionalGeneration

    torch.manual_seed(1)
    PaliGemmaForConditionalGeneration(model_config()).save_pretrained(folder)
    text_tokenizer().save_pretrained(folder)
    SiglipImageProcessor(size={"height": PICTURE, "width": PICTURE}).save_pretrained(folder)
    return str(folder)


class FastProcessor:
    """The interface of the published FAST processor, over our tokenizer."""

    def __init__(self, fast) -> None:
        self.fast, self.scale, self.min_token = fast, fast.scale, fast.min_token
        self.bpe_tokenizer = SimpleNamespace(decode=lambda ids: fast.tokenizer.decode(list(map(int, ids))))

    def __call__(self, actions):
        ids, mask = self.fast.encode(torch.as_tensor(actions))
        return [
            [int(i) for i in row[keep] if i != self.fast.stop] for row, keep in zip(ids, mask, strict=True)
        ]


def reference(fast, monkeypatch):
    """The policy with random weights, and its two tokenising steps."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.pi0_fast import modeling_pi0_fast as module
    from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
    from lerobot.policies.pi0_fast.processor_pi0_fast import (
        Pi0FastPrepareStateAndLanguageTokenizerProcessorStep,
    )
    from lerobot.policies.pi_gemma import PaliGemmaForConditionalGenerationWithPiGemma
    from lerobot.processor import tokenizer_processor

    class SmallPaliGemma(module.PI0FastPaliGemma):
        def __init__(self, *args, **options) -> None:
            nn.Module.__init__(self)
            self.paligemma = PaliGemmaForConditionalGenerationWithPiGemma(config=model_config())

    tokenizers = SimpleNamespace(from_pretrained=lambda *args, **options: text_tokenizer(ends_texts=True))
    processors_ = SimpleNamespace(from_pretrained=lambda *args, **options: FastProcessor(fast))
    monkeypatch.setattr(module, "PI0FastPaliGemma", SmallPaliGemma)
    for place in (module, tokenizer_processor):
        monkeypatch.setattr(place, "AutoTokenizer", tokenizers)
        monkeypatch.setattr(place, "AutoProcessor", processors_)
    spec = tiny_models.SPEC
    config = PI0FastConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (spec.state_dim,)),
            **{
                f"observation.images.{n}": PolicyFeature(FeatureType.VISUAL, (3, PICTURE, PICTURE))
                for n in spec.camera_names
            },
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (spec.action_dim,))},
        chunk_size=tiny_models.HORIZON,
        n_action_steps=tiny_models.HORIZON,
        image_resolution=(PICTURE, PICTURE),
        max_action_tokens=64,
        max_decoding_steps=48,
        device="cpu",
    )
    policy = module.PI0FastPolicy(config)
    actions = tokenizer_processor.ActionTokenizerProcessorStep(
        action_tokenizer_name="fast", max_action_tokens=64
    )
    return policy, Pi0FastPrepareStateAndLanguageTokenizerProcessorStep(), actions
