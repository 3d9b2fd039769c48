"""RT-2: actions as text, learned beside questions about pictures (Brohan et al. 2023, arXiv 2307.15818).

    prefix    pictures, "Q: what action should the robot take to <instruction>? A:"
    answer    "terminate dpos(3) drot(3) gripper", such as "1 128 91 241 5 101 127", then the end of the text

Every number is one of 256 uniform bins and one token: the integer's own where the vocabulary has it (RT-2 on
PaLI-X), else one of the least used, whose meaning training overwrites (on PaLM-E). On robot prompts only
action tokens are decoded (section 3.2); questions are answered freely. Co-fine-tuning mixes pairs of question
and answer, with and without a picture, into every step: `vision_language`.

No code and no weights exist; the facts are the paper's. The backbone is whatever `vlm=` names that writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
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
from librobot.frameworks.vision_language import CoTraining, answers
from librobot.heads.base import ActionHead, NetworkKind
from librobot.losses import reduce
from librobot.nn.pretrained import stored_files
from librobot.normalize import NormalizationMode
from librobot.tokenizers.bins import Bins, BinsToVocabulary
from librobot.types import Batch, Observation, RobotSpec
from librobot.vlms.base import VLM, Context, Vocabulary

Words = Literal["auto", "integers", "least_used", "last"]
ORDER = ("ee_position", "ee_rotation", "joint", "base", "other", "gripper")
GO_ON, STOP = 0, 1  # the terminate token's bins


@dataclass(frozen=True)
class Question:
    def __call__(self, prompts: list[str], state: Tensor) -> list[str]:
        return [f"Q: what action should the robot take to {prompt}? A:" for prompt in prompts]


class RT2(Framework):
    """`vision_language` is {"file", "ratio", "weight"}: pairs (`vision_language_files`), how
    many pairs come with each robot sample, and the weight of their loss beside the actions'."""

    brings: ClassVar[tuple[NetworkKind, ...]] = ("decoder",)
    needs_cache = True
    reads_state = False
    order: Tensor

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
        terminate: bool | Literal["auto"] = "auto",
        words: Words = "auto",
        corpus: str | None = None,
        vision_language: Mapping[str, Any] | None = None,
        pack: bool = False,
        pack_length: int | None = None,
    ) -> None:
        if words not in get_args(Words):
            raise ValueError(f"words must be one of {', '.join(get_args(Words))}, found {words!r}")
        has_bins = isinstance(getattr(head, "tokenizer", None), Bins)
        terminate = has_bins if terminate == "auto" else terminate
        super().__init__(
            spec=spec,
            vlm=writing_vlm(vlm, "framework=rt2"),
            head=head,
            optimizer=optimizer,
            scheduler=scheduler,
            horizon=horizon,
            obs_steps=obs_steps,
            normalization=normalization,
            freeze=freeze,
            lr_multipliers=lr_multipliers,
            embodiments=embodiments,
            action_width=spec.action_dim + terminate,
        )
        if terminate and not has_bins:
            raise ValueError(
                "terminate is one of a bin's tokens, found a head of other tokens; take "
                "head=bins_greedy, or framework.terminate=false"
            )
        self.terminate = terminate
        kinds = [ORDER.index(dim.kind) for dim in spec.action]
        order = sorted(range(spec.action_dim), key=lambda i: kinds[i])
        self.register_buffer("order", torch.tensor(order), persistent=False)
        if head.dim_weights is not None:
            head.dim_weights = self.written(head.dim_weights[: spec.action_dim], 1.0)
        self.tokens = ActionTokens(
            vlm, number_of_tokens(head), ids=word_ids(vlm.vocabulary, number_of_tokens(head), words, corpus)
        )
        write_in_words(head, self.tokens, after=(vlm.vocabulary.end,))
        packing: Any = {"pack": pack, "pack_length": pack_length}
        self.decoder = LanguageDecoder(vlm, self.tokens, **packing)
        self.co_training = CoTraining(vlm, vision_language, self.tokens, **packing)
        self.wants_to_stop: Bool[Tensor, "b k"] | None = None
        self.freeze_unused(layers=(-1,), logits=True)
        self.apply_freeze()

    def compute_loss(
        self, batch: Batch, *, noise: Tensor | None = None, time: Tensor | None = None
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        prefix = self.decoder.read(self.prepare(batch.observation))
        terminate = self.terminate_values(batch) if self.terminate else 0.0
        actions = self.written(self.normalized_actions(batch), terminate)
        mask = self.written(self.real_actions(batch), batch.action_mask[..., None])
        loss = reduce(self.head.loss(self.decoder, prefix, actions, mask), batch.action_mask)
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
        """The actions; `wants_to_stop` then holds whether each step ends the episode."""
        shape = (observation.batch_size, self.horizon, self.action_width)
        prefix = self.prefix(self.prepare(observation))
        written = self.head.sample(self.decoder, prefix, shape, noise=noise, guidance=guidance)
        if self.terminate:
            middle = (self.bin_centre(GO_ON) + self.bin_centre(STOP)) / 2
            self.wants_to_stop, written = written[..., 0] > middle, written[..., 1:]
        return self.physical_actions(written[..., self.order.argsort()], observation)

    def of_dimensions(self, values: Shaped[Tensor, "b k w"]) -> Shaped[Tensor, "b k a"]:
        return values[..., int(self.terminate) :][..., self.order.argsort()]

    def answer(self, observation: Observation, max_tokens: int = 64) -> list[str]:
        """What the model says to questions about pictures: `prompt` holds them, nothing is restricted."""
        assert self.vlm is not None
        return answers(self.vlm, self.decoder, observation, max_tokens)

    def prefix(self, observation: Observation) -> Context:
        assert self.vlm is not None
        return self.vlm(observation, layers=(-1,))

    def prompt_writer(self) -> Question:
        return Question()

    def token_lengths(self, prompts: Sequence[str], state: Tensor, actions: Tensor) -> np.ndarray:
        """For batches of samples of like length (`data.bucket`)."""
        return token_lengths(self, prompts, state, actions)

    def written(self, values: Tensor, terminate: Tensor | float) -> Tensor:
        """Action dimensions in RT-2's order: terminate, position, rotation, the rest, gripper."""
        ordered = values[..., self.order]
        if not self.terminate:
            return ordered
        first = ordered.new_zeros(*ordered.shape[:-1], 1) + terminate
        return torch.cat((first.to(ordered.dtype), ordered), dim=-1)

    def terminate_values(self, batch: Batch) -> Float[Tensor, "b k 1"]:
        """STOP at an episode's last step, where the chunk shows that it is the last: the next is none."""
        real = batch.action_mask
        last = real & ~torch.cat((real[:, 1:], torch.ones_like(real[:, :1])), dim=1)
        values = torch.where(last, self.bin_centre(STOP), self.bin_centre(GO_ON))
        return values[..., None]

    def bin_centre(self, index: int) -> float:
        """The normalised value that falls into a bin."""
        tokenizer: Any = self.head.tokenizer
        bins: Bins = tokenizer.inner
        return bins.low + (index + 0.5) * (bins.high - bins.low) / bins.num_centres


def word_ids(vocabulary: Vocabulary, count: int, words: Words, corpus: str | None) -> list[int] | None:
    """Language tokens for the bins; None leaves the choice (the last ones, or new ones) to `ActionTokens`."""
    if words in ("auto", "integers"):
        try:
            found = BinsToVocabulary.integers(vocabulary.tokenize, count)
        except ValueError as error:
            if words == "integers":
                raise ValueError(f"words=integers: {error}") from error
        else:
            return found.ids.tolist()
    if words == "least_used":
        if stored_files():  # the checkpoint brings the tokens
            return list(range(count))
        if corpus is None:
            raise ValueError("words=least_used needs corpus=FILE, a text that shows what is used")
        with open(corpus, encoding="utf-8") as file:
            used = torch.bincount(
                torch.tensor([i for line in file for i in vocabulary.tokenize(line)]),
                minlength=vocabulary.num_text,
            )
        return BinsToVocabulary.least_used(used[: vocabulary.num_text], count).ids.tolist()
    return None
