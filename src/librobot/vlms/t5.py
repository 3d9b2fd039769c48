"""T5's encoder (Raffel et al. 2020) for instructions, as Octo has it: frozen, 16 tokens with the padding."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from librobot.errors import LibrobotError
from librobot.nn.instructions import InstructionEncoder
from librobot.nn.pretrained import stored_files
from librobot.vlms.loading import as_folder, byte_tokenizer, from_files, has_weights, text_files


@dataclass
class T5Prompts:
    """Prompts to exactly `num_tokens` token ids, padded on the right. A longer one is cut, with a warning
    that shows where (Octo cuts without)."""

    tokenizer: PreTrainedTokenizerBase
    num_tokens: int

    def __call__(self, prompts: list[str], images: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        made = self.tokenizer(
            prompts, max_length=self.num_tokens, padding="max_length", truncation=True, return_tensors="pt"
        )
        full = made["attention_mask"].bool().all(dim=1)
        for row in full.nonzero().flatten().tolist():
            if len(self.tokenizer(prompts[row])["input_ids"]) > self.num_tokens:
                kept = self.tokenizer.decode(made["input_ids"][row], skip_special_tokens=True)
                warnings.warn(
                    f"an instruction may have framework.num_text_tokens={self.num_tokens} tokens; of "
                    f"{prompts[row]!r} everything after {kept!r} is cut",
                    stacklevel=2,
                )
        return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"].bool()}


class T5Instruction(InstructionEncoder):
    """The encoder of `checkpoint` (a hub name or a folder that `save_pretrained` wrote); it does not train.

    With `pretrained` False it has random weights in the sizes of `config`, and a byte tokenizer: nothing is
    downloaded. All `num_tokens` count as real: Octo lets padding be read, the embeddings of which T5 made
    without looking at it.
    """

    def __init__(
        self,
        *,
        checkpoint: str,
        pretrained: bool = True,
        config: Mapping[str, Any] | None = None,
        num_tokens: int = 16,
    ) -> None:
        super().__init__()
        files = stored_files()
        if files:
            with as_folder(files) as folder:
                tokenizer, made = self._read(folder)
        elif pretrained:
            tokenizer, made = self._read(checkpoint)
        else:
            tokenizer = byte_tokenizer(["<pad>", "</s>"], pad="<pad>", eos="</s>")
            made = T5Config(**{"vocab_size": len(tokenizer), **dict(config or {})})
        if pretrained and has_weights(checkpoint):
            with _named(checkpoint):
                self.model = from_files(T5EncoderModel, checkpoint, made, {})
        else:
            self.model = T5EncoderModel(made)
        self.model.requires_grad_(False)
        self.tokenizer = tokenizer
        self.processor = T5Prompts(tokenizer, num_tokens)
        self.width, self.num_tokens = made.d_model, num_tokens

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Float[Tensor, "b l d"], Bool[Tensor, "b l"]]:
        # A batch repeats its instructions: each is encoded once.
        ids, place = torch.unique(inputs["input_ids"], dim=0, return_inverse=True)
        first = torch.stack([(place == i).nonzero()[0, 0] for i in range(len(ids))])
        self.model.eval()
        with torch.no_grad():
            hidden = self.model(
                input_ids=ids, attention_mask=inputs["attention_mask"][first]
            ).last_hidden_state
        return hidden[place], torch.ones_like(inputs["attention_mask"])

    def files(self) -> dict[str, str]:
        return text_files(self.model.config, self.tokenizer)

    @staticmethod
    def _read(checkpoint: str) -> tuple[PreTrainedTokenizerBase, T5Config]:
        with _named(checkpoint):
            return AutoTokenizer.from_pretrained(checkpoint), T5Config.from_pretrained(checkpoint)


class _named:
    """Turns what the hub library raises for a checkpoint that cannot be had into one clear error."""

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError | ValueError):
            raise LibrobotError(
                f"framework.text_checkpoint={self.checkpoint}: neither a folder nor a model that the hub or "
                f"its cache gives ({str(error).strip().splitlines()[0]}). Without network, download it "
                f"elsewhere and name the folder, or take framework.text_encoder=bytes"
            ) from error
