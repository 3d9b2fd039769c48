"""From frames to training samples: past observations, future actions, a mask where the episode ends."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from librobot.data.sources.base import Mixture, OnError, Source
from librobot.errors import LibrobotError
from librobot.representation import Representation
from librobot.types import Batch, Observation


class Processor(Protocol):
    """A framework's processor: prompts, images (b, t, c, h, w) and states (b, t, s) to token tensors."""

    def __call__(self, prompts: list[str], images: dict[str, Tensor], state: Tensor) -> dict[str, Tensor]: ...


class Windows:
    """Which frames belong to which sample. Every frame of the chosen episodes starts one sample.

    A sample at frame f of an episode sees the observations f - obs_steps + 1 .. f (the first frame repeated
    before the episode's start) and has `horizon` actions from f + action_offset on (the first action repeated
    before the episode's start and the last past its end, where the mask is False). So a sample never crosses
    into another episode. The current action, f, is always one of them. `strides` are the frames from one step
    to the next, for each episode of the dataset (None: 1 for all).
    """

    def __init__(
        self,
        episode_lengths: Int[np.ndarray, " e"],
        episodes: Sequence[int],
        *,
        horizon: int,
        obs_steps: int,
        action_offset: int = 0,
        strides: Int[np.ndarray, " e"] | None = None,
    ) -> None:
        if horizon < 1 or obs_steps < 1:
            raise ValueError(
                f"horizon and obs_steps must be at least 1, found horizon={horizon}, obs_steps={obs_steps}"
            )
        if not -horizon < action_offset <= 0:
            raise ValueError(
                f"action_offset must lie between {1 - horizon} (1 - horizon) and 0, found {action_offset}"
            )
        self.horizon, self.obs_steps, self.action_offset = horizon, obs_steps, action_offset
        ends = np.cumsum(episode_lengths)
        chosen = np.asarray(episodes, dtype=np.int64)
        lengths = np.asarray(episode_lengths)[chosen]
        self._begin = np.repeat(ends[chosen] - lengths, lengths)
        self._end = np.repeat(ends[chosen], lengths)
        each = np.ones(len(ends), np.int64) if strides is None else strides
        self._stride = np.repeat(each[chosen], lengths)
        offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        self.rows = self._begin + offsets

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def episode_of_sample(self) -> Int[np.ndarray, " n"]:
        """A number for the episode of each sample, ascending in the order of the samples."""
        return np.cumsum(np.diff(self._begin, prepend=self._begin[:1]) != 0)

    def observation_rows(self, samples: Int[np.ndarray, " b"]) -> Int[np.ndarray, "b t"]:
        steps = np.arange(1 - self.obs_steps, 1)
        rows = self.rows[samples, None] + steps * self._stride[samples, None]
        return np.maximum(rows, self._begin[samples, None])

    def action_rows(
        self, samples: Int[np.ndarray, " b"]
    ) -> tuple[Int[np.ndarray, "b k"], Bool[np.ndarray, "b k"]]:
        steps = self.action_offset + np.arange(self.horizon)
        rows = self.rows[samples, None] + steps * self._stride[samples, None]
        first, last = self._begin[samples, None], self._end[samples, None] - 1
        return rows.clip(first, last), (first <= rows) & (rows <= last)

    def progress(self, samples: Int[np.ndarray, " b"]) -> Float[np.ndarray, "b k"]:
        """The share of its episode that is over at each action, 0 at the first frame and 1 at the last."""
        first, last = self._begin[samples, None], self._end[samples, None] - 1
        rows, _ = self.action_rows(samples)
        return ((rows - first) / np.maximum(last - first, 1)).astype(np.float32)

    def goal_rows(self, samples: Int[np.ndarray, " b"], seed: int) -> Int[np.ndarray, " b"]:
        """A later frame of each sample's episode, all alike likely (its own frame at the end): always the
        same one for a seed."""
        rows, last = self.rows[samples], self._end[samples] - 1
        mixed = (rows.astype(np.uint64) + np.uint64(seed % 2**32)) * np.uint64(0x9E3779B97F4A7C15)
        share = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(40)
        later = rows + 1 + (share.astype(np.float64) / 2**24 * (last - rows)).astype(np.int64)
        return np.minimum(later, last)


class WindowDataset(Dataset[Batch]):
    """Whole batches: `dataset.__getitems__(samples)` gathers a `Batch` at once, so the collate is the
    identity.

    `Batch.extra["rows"]` holds the global frame index of each sample, (b,) int64 numpy, and "progress" the
    share of its episode that is over at each action, (b, k); of a mixture "dataset" numbers its dataset. With
    on_error="skip" a sample that cannot be read is replaced by another of the batch, with a warning, and
    "skipped" counts them. With `goal_seed` the observation has goal pictures: a later frame of its episode
    (Octo's uniform relabelling). `rewrite` says the instructions of a batch, and their rows, in other words;
    `representation` is how the policy sees the actions.
    """

    rewrite: Callable[[list[str], np.ndarray], list[str]] | None = None
    representation: Representation | None = None

    def __init__(
        self,
        source: Source,
        windows: Windows,
        processor: Processor | None = None,
        goal_seed: int | None = None,
        on_error: OnError = "raise",
    ) -> None:
        self.source, self.windows, self.processor = source, windows, processor
        self.goal_seed, self.on_error = goal_seed, on_error

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, sample: int) -> Batch:
        return self.__getitems__([sample])

    def __getitems__(self, samples: Sequence[int]) -> Batch:
        try:
            return self._gather(samples)
        except LibrobotError as error:
            good = [s for s in samples if self.on_error == "skip" and self._can_be_read(s)]
            if not good:
                raise
            bad = len(samples) - len(good)
            warnings.warn(
                f"{bad} of {len(samples)} samples are replaced (on_error=skip): {error}", stacklevel=2
            )
            spare = iter(good * len(samples))
            batch = self._gather([s if s in good else next(spare) for s in samples])
            batch.extra["skipped"] = bad
            return batch

    def _can_be_read(self, sample: int) -> bool:
        try:
            self._gather([sample])
        except LibrobotError:
            return False
        return True

    def _gather(self, samples: Sequence[int]) -> Batch:
        index = np.asarray(samples, dtype=np.int64)
        seen = self.windows.observation_rows(index)
        num, steps = seen.shape
        images = {
            camera: torch.from_numpy(frames).unflatten(0, (num, steps))
            for camera, frames in self.source.images(seen.reshape(-1)).items()
        }
        rows = seen[:, -1]
        prompts = self.source.prompts(rows)
        if self.rewrite is not None:
            prompts = self.rewrite(prompts, rows)
        state = torch.from_numpy(self.source.states(seen.reshape(-1))).unflatten(0, (num, steps))
        mixture = self.source if isinstance(self.source, Mixture) else None
        masks, embodiment = dict.fromkeys(images, np.ones(num, dtype=bool)), None
        if mixture is not None:
            masks = mixture.image_masks(rows)
            if len(mixture.embodiments) > 1:
                embodiment = torch.from_numpy(mixture.embodiment(rows))
        observation = Observation(
            images=images,
            image_mask={camera: torch.tensor(mask) for camera, mask in masks.items()},
            state=state,
            prompt=prompts,
            inputs=self.processor(prompts, images, state) if self.processor is not None else None,
            embodiment=embodiment,
            goal_images=self._goals(index),
        )
        acted, mask = self.windows.action_rows(index)
        actions = torch.from_numpy(self.source.actions(acted.reshape(-1)))
        actions = actions.unflatten(0, (num, self.windows.horizon))
        if self.representation is not None:
            actions = self.representation.encode(actions, state[:, -1], embodiment)
        extra = {"rows": rows, "progress": torch.from_numpy(self.windows.progress(index))}
        if mixture is not None:
            extra["dataset"] = mixture.dataset(rows)
        return Batch(
            observation=observation,
            actions=actions,
            action_mask=torch.from_numpy(mask),
            extra=extra,
        )

    def _goals(self, index: Int[np.ndarray, " b"]) -> dict[str, Tensor] | None:
        if self.goal_seed is None:
            return None
        frames = self.source.images(self.windows.goal_rows(index, self.goal_seed))
        return {camera: torch.from_numpy(pictures) for camera, pictures in frames.items()}
