"""pi0-FAST: actions as compressed text (Pertsch et al. 2025, arXiv 2501.09747; openpi `models/pi0_fast.py`).

    prefix    pictures, "Task: ..., State: 127 3 ...;\\n"   attending to each other, as the backbone's do
    postfix   "Action: " FAST tokens "|" end              each attending to the prefix and to all before it

The loss is the cross-entropy of the postfix's tokens over the whole vocabulary. FAST token i is the language
token `size - 1 - 128 - i`: PaliGemma's last 128 tokens, which mark segments, are left alone. The state is
written as one of 256 bins of [-1, 1] for each dimension, after normalisation.

The backbone is whatever `vlm=` names that writes; PaliGemma is the paper's. `head=` is any that predicts
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from librobot.frameworks.base import Framework, OptimizerFactory, SchedulerFactory
from librobot.frameworks.language_decoder import (
    ActionTokens,
    LanguageDecoder,
    number_of_tokens,
    token_lengths,
    write_in_words,
    writing_vlm,
)
from librobot.frameworks.prompts import cleaned, state_bins
from librobot.frameworks.vision_language import CoTraining
from librobot.heads.base import ActionHead, NetworkKind
from librobot.losses import reduce
from librobot.nn.pictures import resize_with_pad
from librobot.normalize import NormalizationMode
from librobot.types import Batch, Observation, RobotSpec
from librobot.vlms.base import VLM, Context

Decoding = Literal["constrained", "free"]
Start = Literal["none", "begin"]


@dataclass(frozen=True)
class TaskAndState:
    """The prompt. `offset` and `scale` normalise the state; several steps' states follow each other, oldest
    first. The line break that ends it is the backbone's own."""

    offset: tuple[float, ...]
    scale: tuple[float, ...]
    lowercase: bool

    def __call__(self, prompts: list[str], state: Float[Tensor, "b t s"]) -> list[str]:
        offset, scale = (np.asarray(x, dtype=np.float32) for x in (self.offset, self.scale))
        bins = state_bins((state.float().cpu().numpy() - offset) / scale)
        return [
            f"Task: {self.task(prompt)}, State: {', '.join(' '.join(map(str, step)) for step in row)};"
            for prompt, row in zip(prompts, bins, strict=True)
        ]

    def task(self, prompt: str) -> str:
        return cleaned(prompt.lower() if self.lowercase else prompt)


class Pi0FAST(Framework):
    brings: ClassVar[tuple[NetworkKind, ...]] = ("decoder",)
    needs_cache = True
    several_robots = False

    def __init__(
        self,
        *,
        spec: RobotSpec,
        vlm: VLM,
        head: ActionHead,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        horizon: int = 32,
        obs_steps: int = 1,
        normalization: Mapping[str, NormalizationMode],
        freeze: Sequence[str] = (),
        lr_multipliers: Mapping[str, float] | None = None,
        embodiments: Sequence[RobotSpec] | None = None,
        skip_tokens: int = 128,
        lowercase: bool = True,
        start: Start = "none",
        decoding: Decoding = "constrained",
        picture_size: Sequence[int] | None = None,
        vision_language: Mapping[str, Any] | None = None,
        pack: bool = False,
        pack_length: int | None = None,
    ) -> None:
        if decoding not in get_args(Decoding):
            raise ValueError(f"decoding must be constrained or free, found {decoding!r}")
        if embodiments is not None and len(embodiments) > 1:
            raise ValueError(
                f"the state is written into the prompt, with one robot's statistics, found "
                f"{len(embodiments)} robots; take framework=pi0"
            )
        if start not in get_args(Start):
            raise ValueError(f"start must be none or begin, found {start!r}")
        super().__init__(
            spec=spec,
            vlm=writing_vlm(vlm, "framework=pi0_fast"),
            head=head,
            optimizer=optimizer,
            scheduler=scheduler,
            horizon=horizon,
            obs_steps=obs_steps,
            normalization=normalization,
            freeze=freeze,
            lr_multipliers=lr_multipliers,
            embodiments=embodiments,
        )
        self.lowercase = lowercase
        self.picture_size = None if picture_size is None else tuple(picture_size)
        self.tokens = ActionTokens(vlm, number_of_tokens(head), skip=skip_tokens)
        words = vlm.vocabulary
        write_in_words(
            head,
            self.tokens,
            lead=words.tokenize("Action: "),
            after=(words.tokenize("|")[-1], words.end),
            constrained=decoding == "constrained",
        )
        begin = () if start == "none" or words.begin is None else (words.begin,)
        packing: Any = {"pack": pack, "pack_length": pack_length}
        self.decoder = LanguageDecoder(vlm, self.tokens, begin, **packing)
        self.co_training = CoTraining(vlm, vision_language, self.tokens, **packing)
        self.freeze_unused(layers=(-1,), logits=True)
        self.apply_freeze()

    def compute_loss(
        self, batch: Batch, *, noise: Tensor | None = None, time: Tensor | None = None
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        prefix = self.decoder.read(self.shown(batch.observation))
        actions, mask = self.normalized_actions(batch), self.real_actions(batch)
        per_sample = self.head.loss(self.decoder, prefix, actions, mask)
        # Every chunk's text counts alike, however many of its steps are real.
        loss = reduce(per_sample, mask.any(dim=2).any(dim=1, keepdim=True))
        camera = self.spec.cameras[0]
        size = (camera.height, camera.width)
        return self.co_training.add(loss, batch.batch_size, size, self.training)

    def sample_actions(
        self,
        observation: Observation,
        *,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
    ) -> Float[Tensor, "b k a"]:
        shape = (observation.batch_size, self.horizon, self.action_width)
        prefix = self.prefix(observation)
        actions = self.head.sample(self.decoder, prefix, shape, noise=noise, guidance=guidance)
        return self.physical_actions(actions, observation)

    def prefix(self, observation: Observation) -> Context:
        assert self.vlm is not None
        return self.vlm(self.shown(observation), layers=(-1,))

    def shown(self, observation: Observation) -> Observation:
        """What the backbone sees."""
        observation = self.prepare(observation)
        if self.picture_size is not None:
            height, width = self.picture_size
            images = {n: resize_with_pad(x, height, width) for n, x in observation.images.items()}
            observation = replace(observation, images=images)
        return observation

    def token_lengths(self, prompts: Sequence[str], state: Tensor, actions: Tensor) -> np.ndarray:
        """For batches of samples of like length (`data.bucket`)."""
        return token_lengths(self, prompts, state, actions)

    def prompt_writer(self) -> TaskAndState:
        offset, scale = (
            tuple(torch.as_tensor(x).cpu().tolist())
            for x in (self.normalizer.state_offset, self.normalizer.state_scale)
        )
        return TaskAndState(offset, scale, self.lowercase)
