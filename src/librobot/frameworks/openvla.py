"""OpenVLA: a vision-language model that writes actions (Kim et al. 2024, arXiv 2406.09246).

    prefix    pictures, "In: What action should the robot take to <instruction>?\\nOut:"
    start     the word boundary (Llama's token 29871), which the published model saw behind every prompt
    answer    a token for each action dimension, then the end of the text

Each dimension is clipped to the 1st and 99th percentile and falls between 256 edges from -1 to 1; the number
of the interval (1 for the lowest) is counted from the vocabulary's end: `size - number` (Llama's 31999 down
to 31744). The gripper is not normalised. The loss is the cross-entropy of action tokens and end.

The backbone is whatever `vlm=` names that writes; the published one is vlm=prismatic. No state, no history;
one action and one camera in the paper, more of both are allowed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
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
from librobot.frameworks.picture_crop import Acting, PictureCrop
from librobot.heads.base import ActionHead, NetworkKind
from librobot.losses import reduce
from librobot.normalize import NormalizationMode
from librobot.types import Batch, Observation, RobotSpec
from librobot.vlms.base import VLM, Context


@dataclass(frozen=True)
class Question:
    """The prompt of OpenVLA and of OpenVLA-OFT."""

    def __call__(self, prompts: list[str], state: Tensor) -> list[str]:
        return [f"In: What action should the robot take to {prompt.lower()}?\nOut:" for prompt in prompts]


class OpenVLA(Framework):
    brings: ClassVar[tuple[NetworkKind, ...]] = ("decoder",)
    needs_cache = True
    reads_state = False

    def __init__(
        self,
        *,
        spec: RobotSpec,
        vlm: VLM,
        head: ActionHead,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        horizon: int = 1,
        obs_steps: int = 1,
        normalization: Mapping[str, NormalizationMode],
        freeze: Sequence[str] = (),
        lr_multipliers: Mapping[str, float] | None = None,
        embodiments: Sequence[RobotSpec] | None = None,
        normalize_gripper: bool = False,
        crop: float | None = 0.9,
        acting_crop: Acting = "auto",
        pack: bool = False,
        pack_length: int | None = None,
    ) -> None:
        super().__init__(
            spec=spec,
            vlm=writing_vlm(vlm, "framework=openvla"),
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
        self.crop = PictureCrop(crop, acting_crop)
        if not normalize_gripper:
            self.normalizer.leave("action", self.robots.actions_of_kind("gripper"))
        words = vlm.vocabulary
        self.tokens = ActionTokens(vlm, number_of_tokens(head))
        write_in_words(head, self.tokens, after=(words.end,))
        self.decoder = LanguageDecoder(
            vlm, self.tokens, start=(words.space,), pack=pack, pack_length=pack_length
        )
        self.freeze_unused(layers=(-1,), logits=True)
        self.apply_freeze()

    def compute_loss(
        self, batch: Batch, *, noise: Tensor | None = None, time: Tensor | None = None
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        prefix = self.decoder.read(self.shown(batch.observation))
        actions = self.normalized_actions(batch)
        per_sample = self.head.loss(self.decoder, prefix, actions, self.real_actions(batch))
        return reduce(per_sample, batch.action_mask), {}

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
        return self.crop(self.prepare(observation), training=self.training)

    def token_lengths(self, prompts: Sequence[str], state: Tensor, actions: Tensor) -> np.ndarray:
        """For batches of samples of like length (`data.bucket`)."""
        return token_lengths(self, prompts, state, actions)

    def prompt_writer(self) -> Question:
        return Question()
