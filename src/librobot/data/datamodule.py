"""Batches for Lightning, from any source."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import lightning
import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch.utilities.types import TRAIN_DATALOADERS
from torch.utils.data import DataLoader

from librobot.data.augmentations.base import Augmentation, Learning, Rewriting, named_seed
from librobot.data.block_order import BlockOrder
from librobot.data.buckets import LengthBuckets
from librobot.data.mixture_order import MixtureOrder
from librobot.data.sampler import EpochSampler, ResumableLoader, WatchedLoader, whole_batch
from librobot.data.seen_actions import robots_of, seen_chunks, seen_statistics
from librobot.data.sources.base import (
    Cache,
    CacheMode,
    CacheOptions,
    Mixture,
    OnError,
    Source,
    SourceFactory,
)
from librobot.data.step_order import StepOrder
from librobot.data.strided import StrideRotation, strided, strides_of
from librobot.data.windows import Processor, WindowDataset, Windows
from librobot.errors import LibrobotError
from librobot.representation import Representation
from librobot.types import Batch, RobotSpec

TokenLengths = Callable[[Sequence[str], torch.Tensor, torch.Tensor], np.ndarray]
"""(prompts, states (n, t, s), chunks (n, k, a)) -> tokens of each sample's prompt and answer, (n, 2)."""
MakeOrder = Callable[[Source, np.ndarray, int, int], StepOrder]
"""(source, row of each sample, seed, samples of a batch of all devices) -> the order of training."""
LENGTHS_AT_ONCE = 4096
ALONE = {"rank": 0, "num_replicas": 1}


class DataModule(lightning.LightningDataModule):
    """Windows of a dataset in seeded order; the same batches on resume, in the middle of an epoch too.

    source: a built `Source`, or a `SourceFactory` (a `_partial_` node), which is called with `cameras`,
    `image_size` and `cache` when the source is first needed. cache, cache_build, cache_limit_gb: see
    `CacheOptions`. on_error: "skip" leaves episodes that cannot be
    read out, and replaces samples that fail later; both are counted and reported. batch_size: per device.
    val_fraction: the share of episodes, drawn from `seed`, kept for validation. augmentation: applied on the
    device, in training only; then `augmentations`, in their order. drop_last: leave an incomplete training
    batch out. prefetch_factor: batches that each worker prepares. order: "shuffle", or "blocks" of
    `block_frames` neighbouring frames, which come into one batch and share their decoding (`BlockOrder`).
    bucket: of so many batches samples of like length, in tokens, come together (`LengthBuckets`); 0: none.
    stride, stride_rotation: frames of the dataset for each step of samples (`StridedSource`).

    `configure` must be called before the loaders are asked for.
    """

    def __init__(
        self,
        source: Source | SourceFactory,
        *,
        cameras: Sequence[str] | None = None,
        image_size: Sequence[int] | None = None,
        cache: CacheMode = "none",
        cache_build: Literal["ahead", "background"] = "ahead",
        cache_limit_gb: float | None = None,
        on_error: OnError = "raise",
        batch_size: int = 32,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        val_fraction: float = 0.0,
        augmentation: Augmentation | None = None,
        augmentations: Mapping[str, Augmentation | Rewriting] | None = None,
        seed: int = 0,
        drop_last: bool = True,
        order: Literal["shuffle", "blocks"] = "shuffle",
        block_frames: int = 2,
        bucket: int = 0,
        stride: int = 1,
        stride_rotation: StrideRotation | None = None,
    ) -> None:
        super().__init__()
        if stride < 1:
            raise ValueError(f"stride must be at least 1, found {stride}")
        if bucket < 0:
            raise ValueError(f"bucket must be at least 0, found {bucket}")
        if order not in ("shuffle", "blocks"):
            raise ValueError(f"order must be shuffle or blocks, found {order!r}")
        if order == "blocks" and bucket:
            raise ValueError(
                f"order=blocks puts neighbouring frames into a batch, and bucket={bucket} samples of like "
                f"length: set bucket=0, or order=shuffle"
            )
        if order == "blocks" and batch_size % block_frames:
            raise ValueError(
                f"batch_size must be a multiple of block_frames={block_frames} with order=blocks, found "
                f"{batch_size}"
            )
        if batch_size < 1 or num_workers < 0 or prefetch_factor < 1:
            raise ValueError(
                "batch_size and prefetch_factor must be at least 1 and num_workers at least 0, found "
                f"batch_size={batch_size}, prefetch_factor={prefetch_factor}, num_workers={num_workers}"
            )
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must lie in [0, 1), found {val_fraction}")
        self._make_source: Callable[[], Source]
        if isinstance(source, Source):
            if cameras is not None or image_size is not None or cache != "none" or on_error != "raise":
                raise ValueError(
                    "cameras, image_size, cache and on_error have no effect on a source already built"
                )
            self._make_source = lambda: source
        else:
            size = (int(image_size[0]), int(image_size[1])) if image_size is not None else None
            kept: Cache = cache
            if (cache_build, cache_limit_gb) != ("ahead", None):
                kept = CacheOptions(cache, cache_build, cache_limit_gb)
            more = {} if on_error == "raise" else {"on_error": on_error}
            self._make_source = lambda: source(cameras=cameras, image_size=size, cache=kept, **more)
        self.batch_size, self.num_workers, self.prefetch_factor = batch_size, num_workers, prefetch_factor
        self.val_fraction, self.augmentation = val_fraction, augmentation
        self.augmentations = dict(augmentations or {})
        self.seed, self.drop_last = seed, drop_last
        self.order, self.block_frames = order, block_frames
        if not val_fraction:
            # Lightning then sees that there is no validation; it is a choice, not a mistake to warn of.
            warnings.filterwarnings("ignore", "You defined a `validation_step` but have no `val_dataloader`")
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]
        self.on_error = on_error
        self.skipped = 0  # training samples that could not be read and were replaced
        self.bucket = bucket
        self.stride, self.stride_rotation = stride, stride_rotation
        self._token_lengths: TokenLengths | None = None
        self.make_order: MakeOrder | None = None  # a curriculum's, in place of the mixture's or the shuffle
        self._source: Source | None = None
        self._windows: dict[str, int] | None = None
        self._representation: Representation | None = None
        self._make_processor: Callable[[], Processor | None] = lambda: None
        self._goals = False
        self._position: dict[str, int] | None = None
        self._train_sampler: EpochSampler | None = None

    @property
    def source(self) -> Source:
        """The dataset, opened at first use. Raises LibrobotError for options that it does not take."""
        if self._source is None:
            try:
                self._source = strided(self._make_source(), self.stride, self.stride_rotation)
            except (ValueError, TypeError) as error:
                raise LibrobotError(f"data.source: {error}") from error
        return self._source

    @property
    def spec(self) -> RobotSpec:
        return self.source.spec

    @property
    def statistics(self) -> Any:
        """Of every frame of the dataset, for `Normalizer.fit`; a list of them for several robots. With a
        `representation` those of the actions are of the chunks that the policy sees."""
        if self._representation is None:
            return self.source.statistics()
        return seen_statistics(self.source, self._representation, self._known_windows())

    def configure(
        self,
        *,
        horizon: int,
        obs_steps: int = 1,
        action_offset: int = 0,
        make_processor: Callable[[], Processor | None] = lambda: None,
        goals: bool = False,
        representation: Representation | None = None,
        token_lengths: TokenLengths | None = None,
    ) -> None:
        """What the framework needs: `horizon` actions from `action_offset` steps after the current one on,
        `obs_steps` observations, and its processor, which runs in the data workers and is made when they
        start (None leaves `Observation.inputs` empty). `goals` asks for goal pictures. `representation` is
        how the policy sees actions; None: as they are. `token_lengths` is for `bucket`. Raises
        LibrobotError where the representation needs another start of the chunks."""
        if representation is not None and representation.sees_deltas and action_offset:
            raise LibrobotError(
                f"actions: frame=delta starts at the current step, and this framework's chunks start "
                f"{-action_offset} before it; take frame=relative"
            )
        self._windows = {"horizon": horizon, "obs_steps": obs_steps, "action_offset": action_offset}
        self._representation = representation
        self._token_lengths = token_lengths
        self._make_processor = make_processor
        self._goals = goals

    def action_chunks(self, limit: int = 100_000) -> Float[torch.Tensor, "n k a"]:
        """Chunks of the training episodes as the policy sees them, in physical units, evenly spread: at most
        `limit` of them."""
        dataset, _ = self._dataset(self.split()[0], shuffle=False, drop_last=False)
        spread = np.linspace(0, len(dataset) - 1, min(limit, len(dataset)))
        samples = np.unique(spread.round().astype(np.int64))
        return seen_chunks(self.source, dataset.windows, samples, self._representation)

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """Episodes for training and for validation, both ascending."""
        source = self.source
        datasets: list[np.ndarray] = [np.arange(len(source.episode_lengths))]
        if isinstance(source, Mixture):  # each of its datasets keeps its share for validation
            datasets = [np.flatnonzero(source.dataset_of_episode == i) for i in range(len(source.names))]
        parts = [self._split(episodes, i) for i, episodes in enumerate(datasets)]
        return np.sort(np.concatenate([p[0] for p in parts])), np.sort(np.concatenate([p[1] for p in parts]))

    def _split(self, episodes: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
        total = len(episodes)
        held_out = round(total * self.val_fraction)
        if self.val_fraction and total < 2:
            raise LibrobotError(
                f"val_fraction={self.val_fraction} needs at least two episodes, found {total}"
            )
        if self.val_fraction:
            held_out = min(max(held_out, 1), total - 1)
        seed = [self.seed, 1] if number == 0 else [self.seed, 1, number]
        order = np.random.default_rng(seed).permutation(episodes)
        return order[held_out:], order[:held_out]

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        self._teach_augmentations()
        dataset, sampler = self._dataset(
            self.split()[0], shuffle=True, drop_last=self.drop_last, processor=self._make_processor()
        )
        dataset.rewrite = self._rewrite if self._rewriting() else None
        if sampler.num_batches == 0:
            raise LibrobotError(
                f"the training episodes hold {sampler.dataset_size} samples, fewer than one batch of "
                f"{self.batch_size} on each of {sampler.num_replicas} devices: lower data.batch_size or set "
                "data.drop_last=false"
            )
        if self._position is not None:
            sampler.load_state_dict(self._position)
            self._position = None
        self._train_sampler = sampler
        return ResumableLoader(dataset, sampler, state=self.state_dict, **self._worker_options())

    def val_dataloader(self) -> DataLoader[Batch]:
        processor = self._make_processor()
        dataset, sampler = self._dataset(self.split()[1], shuffle=False, drop_last=False, processor=processor)
        return WatchedLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=whole_batch,
            **self._worker_options(),
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment on the device, while training only."""
        if self.trainer is None or not self.trainer.training:
            return batch
        if self._train_sampler is not None:
            self._train_sampler.advance(self.trainer.num_training_batches)
        self.skipped += int(batch.extra.get("skipped", 0))
        epoch = self._train_sampler.epoch if self._train_sampler is not None else 0
        # A draw that depends on what the batch is, not on when it comes, is the same after a resume.
        seed = (self.seed, epoch, int(batch.extra["rows"][0]))
        if self.augmentation is not None:
            batch = self.augmentation(batch, seed=seed)
        for name, augmentation in self.augmentations.items():
            if not isinstance(augmentation, Rewriting):
                batch = augmentation(batch, seed=named_seed(seed, name))
        return batch

    def _rewriting(self) -> dict[str, Rewriting]:
        return {name: a for name, a in self.augmentations.items() if isinstance(a, Rewriting)}

    def _rewrite(self, prompts: list[str], rows: np.ndarray) -> list[str]:
        """Instructions said otherwise, drawn from which samples the batch holds: others in each epoch."""
        for name, augmentation in self._rewriting().items():
            prompts = augmentation.rewrite(prompts, seed=named_seed((self.seed, *rows.tolist()), name))
        return prompts

    def _teach_augmentations(self) -> None:
        learning = [a for a in self.augmentations.values() if isinstance(a, Learning)]
        if learning:
            statistics = self.statistics
            each = statistics if isinstance(statistics, list) else [statistics]
            for augmentation in learning:
                augmentation.learn(robots_of(self.source, self._representation), each)

    def teardown(self, stage: str) -> None:
        """Say how many samples could not be read."""
        if stage == "fit" and self.skipped:
            warnings.warn(
                f"{self.skipped} training samples could not be read and were replaced", stacklevel=2
            )

    def state_dict(self) -> dict[str, Any]:
        """Where the training data are: {} before training."""
        if self._train_sampler is None or self.trainer is None:
            return {}
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current.state_dict()
        # Batches that reached the trainer but whose step was interrupted are taken again.
        pending = max(0, progress["ready"] - progress["processed"])
        return self._train_sampler.state_dict(pending)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._position = dict(state_dict) or None

    def _dataset(
        self,
        episodes: np.ndarray,
        *,
        shuffle: bool,
        drop_last: bool,
        processor: Processor | None = None,
    ) -> tuple[WindowDataset, EpochSampler]:
        lengths, strides = self.source.episode_lengths, strides_of(self.source)
        windows = Windows(lengths, episodes.tolist(), strides=strides, **self._known_windows())
        dataset = WindowDataset(
            self.source, windows, processor, self.seed if self._goals else None, self.on_error
        )
        dataset.representation = self._representation
        trainer = self.trainer
        place = {"rank": trainer.global_rank, "num_replicas": trainer.world_size} if trainer else ALONE
        # Processes that share their samples (tensor parallelism) count once.
        place = getattr(getattr(trainer, "strategy", None), "distributed_sampler_kwargs", None) or place
        order: MixtureOrder | BlockOrder | StepOrder | None = None
        if shuffle and self.make_order is not None:
            if self.order != "shuffle":
                raise LibrobotError(
                    f"data.order={self.order}: a curriculum decides about each batch; take shuffle"
                )
            stretch = self.batch_size * place["num_replicas"]
            order = self.make_order(self.source, windows.rows, self.seed, stretch)
        elif shuffle and isinstance(self.source, Mixture):
            if self.order != "shuffle":
                raise LibrobotError(f"data.order={self.order} is for one dataset; a mixture is shuffled")
            owners = self.source.dataset(windows.rows)
            groups = [np.flatnonzero(owners == i) for i in range(len(self.source.names))]
            order = MixtureOrder(groups, self.source.shares, seed=self.seed, names=self.source.names)
        elif shuffle and self.order == "blocks":
            order = BlockOrder(windows.episode_of_sample, self.block_frames, seed=self.seed)
        arranged = order.indices if order is not None else None
        if shuffle and self.bucket:
            arranged = self._bucketed(arranged, windows, self.batch_size * place["num_replicas"])
        sampler = EpochSampler(
            len(dataset) if order is None or isinstance(order, BlockOrder) else len(order),
            self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=self.seed,
            rank=place["rank"],
            world_size=place["num_replicas"],
            order=arranged,
            order_name=f"blocks of {self.block_frames}" if isinstance(order, BlockOrder) else "shuffle",
        )
        return dataset, sampler

    def _bucketed(self, order: Callable[[int], np.ndarray] | None, windows: Windows, batch: int) -> Any:
        """The order with samples of like length beside each other."""
        measure = self._token_lengths
        if measure is None:
            raise LibrobotError(
                "data.bucket puts samples of like length together, and this framework writes no tokens; set "
                "data.bucket=0, or take framework=pi0_fast, openvla or rt2"
            )
        if self.make_order is not None:
            raise LibrobotError("data.bucket: a curriculum decides about each batch; set it to 0")
        parts = []
        for start in range(0, len(windows), LENGTHS_AT_ONCE):
            samples = np.arange(start, min(start + LENGTHS_AT_ONCE, len(windows)))
            rows = windows.rows[samples]
            seen = windows.observation_rows(samples)
            state = torch.from_numpy(self.source.states(seen.reshape(-1))).unflatten(0, seen.shape)
            chunks = seen_chunks(self.source, windows, samples, self._representation)
            parts.append(measure(self.source.prompts(rows), state, chunks))
        seed, count = self.seed, len(windows)
        shuffled = order or (lambda epoch: np.random.default_rng([seed, epoch]).permutation(count))
        lengths = np.concatenate(parts)
        return LengthBuckets(shuffled, lengths, batch=batch, window=self.bucket, seed=seed).indices

    def _known_windows(self) -> dict[str, int]:
        if self._windows is None:
            raise LibrobotError(
                "the data module does not know the framework's horizon yet: call "
                "datamodule.configure(horizon=..., obs_steps=..., make_processor=...) first"
            )
        return self._windows

    def _worker_options(self) -> dict[str, Any]:
        if self.num_workers == 0:
            return {}
        return {
            "num_workers": self.num_workers,
            "prefetch_factor": self.prefetch_factor,
            "persistent_workers": True,
        }
