"""What openpi's models are asked: the instruction, cleaned, and for pi0.5 the state in words.

Prompt writers run in data workers: numpy alone, picklable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

NUM_BINS = 256


def cleaned(prompt: str) -> str:
    """Without blanks around it, underscores and line breaks as blanks (openpi `tokenizer.py`)."""
    return prompt.strip().replace("_", " ").replace("\n", " ")


def state_bins(state: Float[np.ndarray, "*b s"]) -> Int[np.ndarray, "*b s"]:
    """Bins of a normalised state: 256 equal ones over [-1, 1], each with its lower edge. Values from 1 on
    stay in the last bin, 255; values below -1 give -1, as in openpi."""
    return np.digitize(state, np.linspace(-1, 1, NUM_BINS + 1)[:-1]) - 1


@dataclass(frozen=True)
class CleanedPrompt:
    """pi0's prompt. The line break that ends it is the backbone's own."""

    def __call__(self, prompts: list[str], state: Tensor) -> list[str]:
        return [cleaned(prompt) for prompt in prompts]


@dataclass(frozen=True)
class StateInPrompt:
    """pi0.5's prompt, with the last observation step's state. `offset` and `scale` normalise it."""

    offset: Sequence[float]
    scale: Sequence[float]

    def __call__(self, prompts: list[str], state: Float[Tensor, "b t s"]) -> list[str]:
        offset, scale = (np.asarray(x, dtype=np.float32) for x in (self.offset, self.scale))
        bins = state_bins((state.float().cpu().numpy()[:, -1] - offset) / scale)
        return [
            f"Task: {cleaned(prompt)}, State: {' '.join(map(str, row))};\nAction: "
            for prompt, row in zip(prompts, bins, strict=True)
        ]
