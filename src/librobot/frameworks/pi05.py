"""pi0.5 (Physical Intelligence 2025, arXiv 2504.16054; openpi `models/pi0.py` with `pi05=True`): pi0, and

    state     in words: 256 bins of each normalised dimension, as numbers in the prompt; no state token
    time      no part of the action tokens: it scales, shifts and gates the expert's norms
    units     quantiles q01 and q99 at -1 and 1

    prefix    images, "Task: ..., State: 127 3 ...;\\nAction: "    attending to each other
    suffix    one token per action, attending to the prefix and to each other

With `head=hybrid` the language model also writes the chunk as FAST tokens behind the prefix, which the action
tokens do not see, and the flow head's gradient stops at the prefix: knowledge insulation (Driess et al. 2025,
arXiv 2505.23705).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from librobot.frameworks.action_expert import ActionExpert
from librobot.frameworks.base import OptimizerFactory, SchedulerFactory
from librobot.frameworks.language_decoder import (
    ActionTokens,
    LanguageDecoder,
    number_of_tokens,
    write_in_words,
    writing_vlm,
)
from librobot.frameworks.pi0 import Condition, Pi0
from librobot.frameworks.prompts import CleanedPrompt, StateInPrompt
from librobot.frameworks.vision_language import CoTraining
from librobot.heads.base import ActionHead, DecoderState, NetworkKind
from librobot.nn.positions import time_embedding
from librobot.normalize import NormalizationMode
from librobot.types import Batch, RobotSpec
from librobot.vlms.base import VLM, ObservationProcessor, PromptWriter

Modulation = Literal["adaln_zero", "adaln"]


class Pi05(Pi0):
    brings: ClassVar[tuple[NetworkKind, ...]] = ("denoiser", "pair")
    several_robots: ClassVar[bool] = False  # the prompt is written by the statistics of one
    denoiser_parts: ClassVar[tuple[str, ...]] = (
        "expert",
        "action_in_proj",
        "time_mlp_in",
        "time_mlp_out",
        "action_out_proj",
    )

    def __init__(
        self,
        *,
        spec: RobotSpec,
        vlm: VLM,
        head: ActionHead,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        horizon: int = 50,
        obs_steps: int = 1,
        normalization: Mapping[str, NormalizationMode],
        freeze: Sequence[str] = (),
        lr_multipliers: Mapping[str, float] | None = None,
        max_action_dim: int | None = 32,
        expert_width: int | None = None,
        expert_mlp_ratio: int = 4,
        picture_size: Sequence[int] | None = None,
        compile: str | None = None,
        state_in_prompt: bool = True,
        modulation: Modulation = "adaln_zero",
        max_prompt_tokens: int = 200,
        skip_tokens: int = 128,
        embodiments: Sequence[RobotSpec] | None = None,
        vision_language: Mapping[str, Any] | None = None,
        pack: bool = False,
        pack_length: int | None = None,
    ) -> None:
        if modulation not in get_args(Modulation):
            raise ValueError(f"modulation must be one of {get_args(Modulation)}, found {modulation!r}")
        if embodiments is not None and len(embodiments) > 1:
            raise ValueError(
                f"framework=pi05 writes the state into the prompt by the statistics of one robot, found "
                f"{len(embodiments)} robots; take framework=pi0"
            )
        # Before the base's, which makes the expert.
        self.state_in_prompt, self.modulation, self.skip_tokens = state_in_prompt, modulation, skip_tokens
        self.answers_questions = vision_language is not None
        super().__init__(
            spec=spec,
            vlm=vlm,
            head=head,
            optimizer=optimizer,
            scheduler=scheduler,
            horizon=horizon,
            obs_steps=obs_steps,
            normalization=normalization,
            freeze=freeze,
            lr_multipliers=lr_multipliers,
            max_state_dim=None,
            max_action_dim=max_action_dim,
            expert_width=expert_width,
            expert_mlp_ratio=expert_mlp_ratio,
            picture_size=picture_size,
            compile=compile,
            embodiments=embodiments,
        )
        if vision_language is not None:
            writing_vlm(vlm, "framework=pi05 with vision_language")
        elif pack:
            raise ValueError(
                "pack=true has no effect without vision_language: the robot's own rows keep their places, as "
                "the expert reads the prefix's cache; leave pack at false"
            )
        self.co_training = CoTraining(vlm, vision_language, pack=pack, pack_length=pack_length)
        self.asked = vlm.prompts_as_written(max_prompt_tokens) if state_in_prompt else vlm.processor

    def compute_loss(
        self, batch: Batch, *, noise: Tensor | None = None, time: Tensor | None = None
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        loss, metrics = super().compute_loss(batch, noise=noise, time=time)
        camera = self.spec.cameras[0]
        total, parts = self.co_training.add(
            loss, batch.batch_size, (camera.height, camera.width), self.training
        )
        return total, metrics | parts

    def make_expert(self, mlp_width: int) -> None:
        assert self.vlm is not None
        self.expert = ActionExpert(
            self.width,
            mlp_width,
            self.vlm.geometry,
            condition_width=self.width if self.head.generative else 0,
            gate_bias=1.0 if self.modulation == "adaln" else 0.0,
        )
        self.state_proj = None
        if self.head.generative:
            self.action_in_proj = nn.Linear(self.action_width, self.width)
            self.time_mlp_in = nn.Linear(self.width, self.width)
            self.time_mlp_out = nn.Linear(self.width, self.width)
        else:
            self.action_token = nn.Parameter(torch.randn(self.width))
        self.decoder: ConditionDecoder | None = None
        if self.head.network == "pair":
            self.make_decoder()

    def make_decoder(self) -> None:
        """The language model that writes the tokens of a chunk, as pi0-FAST's does."""
        vlm = writing_vlm(self.vlm, "framework=pi05 with head=hybrid")
        tokens: Any = self.head.tokens
        self.tokens = ActionTokens(vlm, number_of_tokens(tokens), skip=self.skip_tokens)
        words = vlm.vocabulary
        write_in_words(tokens, self.tokens, after=(words.tokenize("|")[-1], words.end))
        self.decoder = ConditionDecoder(LanguageDecoder(vlm, self.tokens))

    @property
    def network(self) -> Any:
        if self.decoder is None:
            return self.denoise
        return {"denoiser": self.denoise, "decoder": self.decoder}

    def denoise(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b k o"]:
        place = self.locate(condition) if condition.place is None else condition.place
        modulation = self.embed_time(time) if self.head.generative else None
        return self.action_out_proj(self.expert(self.embed_actions(x_t, time), place, modulation))

    def embed_actions(self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"]) -> Float[Tensor, "b k d"]:
        if not self.head.generative:
            return self.action_token.expand(len(x_t), self.horizon, self.width)
        return self.action_in_proj(x_t.to(self.action_in_proj.weight.dtype))

    def embed_time(self, time: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """swish(W2 swish(W1 phi(t))): the condition of the expert's norms."""
        embedded = time_embedding(time, self.width).to(self.time_mlp_in.weight.dtype)
        return functional.silu(self.time_mlp_out(functional.silu(self.time_mlp_in(embedded))))

    @property
    def processor(self) -> ObservationProcessor:
        made = super().processor
        assert made is not None
        return replace(made, processor=self.asked)

    def prompt_writer(self) -> PromptWriter:
        if not self.state_in_prompt:
            return CleanedPrompt()
        statistics: Any = self.normalizer
        offset, scale = statistics.state_offset, statistics.state_scale
        return StateInPrompt(offset=offset.tolist(), scale=scale.tolist())


@dataclass
class ConditionDecoder:
    """The language model behind the prefix, as the token head sees it."""

    decoder: LanguageDecoder

    def __call__(self, tokens: Int[Tensor, "b l"], condition: Condition) -> Float[Tensor, "b l v"]:
        return self.decoder(tokens, condition.prefix)

    def begin(self, condition: Condition) -> DecoderState:
        return self.decoder.begin(condition.prefix)
