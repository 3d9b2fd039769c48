"""What the published backbones share: one of transformers' own models behind librobot's contract.

A family adds its classes, its prompt and the number of tokens of a picture. The model runs through its own
`forward`, so that its numbers are transformers' numbers; here are only its inputs and what is taken out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig

from librobot.errors import LibrobotError, nearest
from librobot.types import Observation
from librobot.vlms.assembly import AssembledVLM
from librobot.vlms.base import Context, Geometry, Vocabulary, extension
from librobot.vlms.blocks import freeze_parts, keep_first, recompute
from librobot.vlms.checks import check_attention, check_picture
from librobot.vlms.packed import PackedSamples, read_packed, why_not_packed
from librobot.vlms.prefix import ExtendedCache, FullCache, PrefixCache
from librobot.vlms.prompts import PromptProcessor, Template, without_absent

AttentionImplementation = Literal["eager", "sdpa", "flash_attention_2", "flex_attention"]


class PretrainedVLM(AssembledVLM):
    """A published backbone: weights of `checkpoint` (a hub name or a folder that `save_pretrained` wrote).

    With `pretrained` False the model has random weights, the sizes of `config` and a byte tokenizer: nothing
    is downloaded. `num_layers` keeps that many of the first layers and removes the others. `final_norm` says
    whether the last hidden states have passed the final norm. `prefix_attention` None is the family's own.
    `freeze` names parts that do not train (see `parts`); `train_last_layers` freezes all but the last
    layers of the language model. `compile` compiles each layer. `dtype` is the weights'.
    """

    template: ClassVar[Template]
    adapter_targets: ClassVar[Sequence[str]] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    tensor_plan: ClassVar[Mapping[str, str]] = {
        "self_attn.q_proj": "column", "self_attn.k_proj": "column", "self_attn.v_proj": "column",
        "self_attn.o_proj": "row", "mlp.gate_proj": "column", "mlp.up_proj": "column", "mlp.down_proj": "row",
    }  # fmt: skip
    """How tensor parallelism splits a block: see `librobot.frameworks.sharding`."""
    natural_attention: ClassVar[Literal["causal", "bidirectional"]] = "causal"
    processor_class: ClassVar[type[PromptProcessor]] = PromptProcessor
    takes_floats: ClassVar[bool] = False
    """Whether `picture_inputs` takes floats in [0, 1] beside uint8."""
    can_stop: ClassVar[bool] = False
    """Whether a pass may end where the last layer has given its keys and values, if only those are wanted."""

    def __init__(
        self,
        *,
        checkpoint: str | None = None,
        pretrained: bool = True,
        config: Mapping[str, Any] | None = None,
        pictures: Mapping[str, Any] | None = None,
        num_layers: int | None = None,
        prefix_attention: Literal["causal", "bidirectional"] | None = None,
        final_norm: bool = True,
        max_prompt_tokens: int = 128,
        attn_implementation: AttentionImplementation = "sdpa",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        freeze: Sequence[str] = (),
        train_last_layers: int | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self._check_options(prefix_attention, final_norm, attn_implementation, freeze)
        self.checkpoint = checkpoint
        self.assemble(checkpoint, pretrained, config, dict(pictures or {}), attn_implementation, dtype)
        if num_layers is not None:
            keep_first(self.blocks, self.text_config, num_layers)
        self.hidden_size = self.text_config.hidden_size
        self.geometry = self._geometry()
        self.causal = (prefix_attention or self.natural_attention) == "causal"
        if self.causal != (self.natural_attention == "causal"):
            self.set_causal(self.causal)
        self.final_norm = final_norm
        self._before_norm: Tensor | None = None
        if not final_norm:
            self.norm.register_forward_pre_hook(self._keep_norm_input)
        self.processor = self.make_processor(max_prompt_tokens)
        freeze_parts(self.model, self.blocks, self.part_of, freeze, train_last_layers)
        self.stops_early = self.can_stop and not gradient_checkpointing  # what runs again goes to its end
        if gradient_checkpointing:
            recompute(self.blocks)
            recompute(self.vision_blocks)
        if compile:
            for block in self.blocks[: len(self.blocks) - self.can_stop]:  # the last one may not end
                block.compile()

    # What a family may override.

    @property
    def text(self) -> Any:
        """The language model, without its output layer."""
        return self.model.model.language_model

    @property
    def vision_blocks(self) -> nn.ModuleList:
        raise NotImplementedError

    @property
    def norm(self) -> nn.Module:
        """The final norm of the language model."""
        return self.text.norm

    def make_processor(self, max_prompt_tokens: int, template: Template | None = None) -> PromptProcessor:
        return self.processor_class(
            self.tokenizer,
            template or self.template,
            max_prompt_tokens,
            self.tokens_per_picture(),
            **self.processor_options(),
        )

    def processor_options(self) -> dict[str, Any]:
        """What `processor_class` takes beside what all processors do."""
        return {}

    def tokens_per_picture(self) -> int:
        """Placeholders for a picture, where they do not depend on its size."""
        return 0

    def set_causal(self, causal: bool) -> None:
        """Make the language model attend causally, or in both directions."""
        self.text_config.is_causal = causal
        for block in self.blocks:
            attention: Any = block.self_attn
            attention.is_causal = causal

    def picture_inputs(self, pictures: list[Tensor], batch_size: int) -> dict[str, Tensor]:
        """The model's arguments for `pictures`: sample by sample, camera by camera, oldest step first."""
        made = self.picture_processor(images=pictures, return_tensors="pt")
        return {name: value.to(pictures[0].device) for name, value in made.items()}

    def prefix_mask(self, mask: Bool[Tensor, "b l"]) -> Tensor:
        """Which tokens are real, as the model takes it."""
        return mask

    def text_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's arguments beside token ids, masks, positions and pictures."""
        return {}

    def never_used(self) -> list[nn.Module]:
        """Modules that no `Context` depends on."""
        head = self.model.get_output_embeddings()
        tied = head is not None and head.weight is self.model.get_input_embeddings().weight
        return [] if head is None or tied else [head]

    # The contract.

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        return self.text.layers

    @property
    def text_config(self) -> PreTrainedConfig:
        return self.model.config.get_text_config()

    def forward(self, observation: Observation, *, layers: Sequence[int] = (-1,)) -> Context:
        inputs, mask = self._inputs(observation)
        wanted, count = self.wanted(layers), len(self.blocks) + 1
        cache = PrefixCache(len(self.blocks), stop=self.stops_early and not wanted)
        with self._watched_end(cache.stop) as entering:
            out = self.model.model(
                input_ids=inputs["input_ids"],
                attention_mask=self.prefix_mask(mask),
                position_ids=self.model_positions(inputs["position_ids"]),
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=any(layer != count - 1 for layer in wanted),
                **self.text_inputs(inputs),
                **self._pictures(observation),
            )
        if entering:
            last = entering[0]
        else:
            last = out.last_hidden_state if self.final_norm else self._taken_before_norm()
        hidden = tuple(last if layer == count - 1 else out.hidden_states[layer] for layer in wanted)
        keys, values = cache.taken()
        return Context(
            hidden=hidden[-1] if hidden else last,
            layers=hidden,
            keys=keys,
            values=values,
            mask=mask,
            next_position=inputs["next_position"],
            pictures=inputs["camera"] > 0,
        )

    @contextmanager
    def _watched_end(self, stops: bool) -> Iterator[list[Tensor]]:
        """The residual stream that enters the last block, where the pass stops inside it."""
        entering: list[Tensor] = []
        if not stops:
            yield entering
            return
        watch = self.blocks[-1].register_forward_pre_hook(lambda _, given: entering.append(given[0]))
        try:
            with suppress(FullCache):
                yield entering
        finally:
            watch.remove()

    def wanted(self, layers: Sequence[int]) -> list[int]:
        """Hidden states counted from the embedded input. Raises ValueError where there is no such state."""
        count = len(self.blocks) + 1
        for layer in layers:
            if not -count <= layer < count:
                raise ValueError(f"the hidden states are 0 to {count - 1} (or negative), found {layer}")
        return [layer % count for layer in layers]

    def model_positions(self, positions: Tensor) -> Tensor:
        """The processor's positions as the model takes them."""
        return positions

    def prompts_as_written(self, max_tokens: int) -> PromptProcessor:
        template = self.template if self.template.tail.strip() else replace(self.template, tail="")
        return self.make_processor(max_tokens, template)

    @property
    def vocabulary(self) -> Vocabulary:
        tokenizer, config = self.tokenizer, self.text_config
        size = self.model.get_output_embeddings().weight.shape[0]

        def tokenize(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        def detokenize(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True))

        begin = tokenizer.bos_token_id
        if begin is None:
            begin = getattr(config, "bos_token_id", None)
        end = tokenizer.eos_token_id
        # SentencePiece has a token for the boundary alone, which a text that begins with a space doubles.
        space = tokenizer.get_vocab().get("\u2581") or tokenize(" ")[-1]
        return Vocabulary(
            size=size,
            num_text=min(tokenizer.vocab_size, size),
            begin=begin if isinstance(begin, int) and begin < size else None,
            end=config.eos_token_id if end is None else end,
            space=space,
            tokenize=tokenize,
            detokenize=detokenize,
        )

    def embed_tokens(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        return self.model.get_input_embeddings()(ids)

    def extend(
        self,
        context: Context,
        x: Float[Tensor, "b q d"],
        *,
        sees: Bool[Tensor, "#b q q"] | None = None,
        real: Bool[Tensor, "b q"] | None = None,
    ) -> Context:
        mask, positions, all_real = extension(context, x.shape[1], sees, real)
        cache = ExtendedCache(context.keys, context.values)
        hidden_ones = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, torch.finfo(x.dtype).min)
        out = self.text(
            inputs_embeds=x,
            attention_mask=hidden_ones[:, None],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        keys, values = cache.taken()
        return Context(
            hidden=out.last_hidden_state if self.final_norm else self._taken_before_norm(),
            layers=(),
            keys=keys,
            values=values,
            mask=all_real,
            next_position=positions[:, -1] + 1,
        )

    @property
    def cannot_pack(self) -> str | None:
        return why_not_packed(self)

    def read_packed(
        self,
        observation: Observation,
        x: Float[Tensor, "b q d"],
        real: Bool[Tensor, "b q"],
        *,
        length: int | None = None,
    ) -> Float[Tensor, "b m d"]:
        return read_packed(self, observation, x, real, length)

    def packed_inputs(self, given: dict[str, Any], samples: PackedSamples) -> dict[str, Any]:
        """What enters the language model, where a family gives it more than embeddings, masks, positions."""
        return given

    def logits(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        logits = self.model.get_output_embeddings()(hidden)
        cap = getattr(self.text_config, "final_logit_softcapping", None)
        return logits if cap is None else cap * (logits / cap).tanh()

    def unused_parameters(self, layers: Sequence[int], *, logits: bool = False) -> list[nn.Parameter]:
        unused = self.never_used()
        if logits:
            unused = [module for module in unused if module is not self.model.get_output_embeddings()]
        if not logits and len(self.blocks) not in self.wanted(layers):
            last = self.blocks[-1]
            unused += [
                child for name, child in last.named_children() if name not in ("self_attn", "input_layernorm")
            ]
            attention: Any = last.self_attn
            unused += [c for name, c in attention.named_children() if name in ("q_proj", "o_proj", "q_norm")]
            unused.append(self.norm)
        elif not self.final_norm:
            unused.append(self.norm)
        return [parameter for part in unused for parameter in part.parameters()]

    @torch.inference_mode()
    def generate(self, observation: Observation, max_new_tokens: int = 64, **options: Any) -> list[str]:
        """The model's answer to each prompt, by transformers' `generate` (greedy by default)."""
        inputs, mask = self._inputs(observation)
        shift = inputs["attention_mask"].shape[1] - inputs["attention_mask"].sum(dim=1)

        def left(x: Tensor) -> Tensor:  # generation appends on the right, so padding goes to the left
            return torch.stack([row.roll(int(by)) for row, by in zip(x, shift, strict=True)])

        moved = {name: left(inputs[name]) for name in ("input_ids", "attention_mask", "camera")}
        options = {"do_sample": False, "max_new_tokens": max_new_tokens} | options
        ids = self.model.generate(
            input_ids=moved["input_ids"],
            attention_mask=left(mask).long(),
            pad_token_id=self.tokenizer.pad_token_id,
            **self.text_inputs(moved),
            **self._pictures(observation),
            **options,
        )
        return self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _check_options(
        self, prefix_attention: str | None, final_norm: bool, attention: str, freeze: Sequence[str]
    ) -> None:
        if prefix_attention not in (None, "causal", "bidirectional"):
            raise ValueError(f"prefix_attention is causal or bidirectional, found {prefix_attention!r}")
        for part in freeze:
            if part not in self.parts:
                raise ValueError(f"freeze: no part {part!r}; {nearest(part, self.parts)}")
        check_attention(attention)

    def _geometry(self) -> Geometry:
        text = self.text_config
        heads = text.num_attention_heads
        return Geometry(
            num_layers=len(self.blocks),
            num_heads=heads,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            rope_theta=float((text.rope_parameters or {}).get("rope_theta", 10_000.0)),
        )

    # Inputs.

    def _inputs(self, observation: Observation) -> tuple[dict[str, Tensor], Bool[Tensor, "b l"]]:
        """The processor's tensors without the cameras that are absent, and which tokens are real."""
        if observation.inputs is None:
            raise LibrobotError(
                f"{type(self).__name__} needs observation.inputs: what its processor made of the prompts"
            )
        masks = [observation.image_mask[name] for name in observation.images]
        return without_absent(observation.inputs, masks)

    def _pictures(self, observation: Observation) -> dict[str, Tensor]:
        if not observation.images:
            return {}
        images = [
            check_picture(name, image, keep_floats=self.takes_floats)
            for name, image in observation.images.items()
        ]
        b = observation.batch_size
        pictures = [step for i in range(b) for image in images for step in image[i]]
        dtype = self.model.get_input_embeddings().weight.dtype
        made = self.picture_inputs(pictures, b)
        return {name: v.to(dtype) if v.is_floating_point() else v for name, v in made.items()}

    def _keep_norm_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._before_norm = args[0]

    def _taken_before_norm(self) -> Float[Tensor, "b l d"]:
        taken, self._before_norm = self._before_norm, None
        assert taken is not None
        return taken
