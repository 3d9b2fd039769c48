"""The order of samples: a permutation per epoch that every rank shares, and that resumes in the middle."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler

from librobot.data.shared_memory import sent
from librobot.data.windows import WindowDataset
from librobot.types import Batch


class EpochSampler(DistributedSampler[int]):
    """Sample indices for one rank, in batches of `batch_size`, epoch after epoch.

    The permutation is drawn from (seed, epoch) alone. Global batch g is the g-th stretch of `world_size *
    batch_size` indices, of which each rank takes its own part: no two ranks see the same sample in an epoch,
    and all have as many batches. With `drop_last` an incomplete global batch is left out; without it the
    ranks share what remains, of which at most `world_size - 1` samples are left out. `order` gives the
    `num_samples` sample indices of an epoch in the place of the permutation, and `order_name` says which
    order that is.

    The sampler keeps its own place: `__iter__` gives what `advance` has not counted of the current epoch, or
    the next epoch. Lightning's count of epochs is not used: it calls an epoch done that `max_steps` cut
    short, and after a resume at an epoch's end it may take one batch before it starts the next. Deriving from
    DistributedSampler only keeps Lightning from wrapping this one.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        shuffle: bool,
        drop_last: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        order: Callable[[int], np.ndarray] | None = None,
        order_name: str = "shuffle",
    ) -> None:
        # The parent's constructor asks for a dataset and for torch.distributed; its attributes suffice.
        self.num_replicas, self.rank = world_size, rank
        self.dataset_size, self.batch_size = num_samples, batch_size
        self.shuffle, self.drop_last, self.seed = shuffle, drop_last, seed
        unit = world_size * batch_size if drop_last else world_size
        self.num_used = num_samples // unit * unit
        self.num_batches = -(-self.num_used // (world_size * batch_size))
        self.order, self.order_name = order, order_name
        self.epoch = 0
        self._skip = self._taken = 0
        self._limit = self.num_batches

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch."""
        return self.num_used // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        self.load_state_dict(self.state_dict())
        rest = slice(self._skip * self.batch_size, self._limit * self.batch_size)
        return iter(self.indices(self.epoch)[rest].tolist())

    def indices(self, epoch: int) -> np.ndarray:
        """This rank's samples in `epoch`, in order."""
        order: np.ndarray = np.arange(self.dataset_size)
        if self.order is not None:
            order = self.order(epoch)
        elif self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        stretch = self.num_replicas * self.batch_size
        whole = self.num_used // stretch * stretch
        parts = order[:whole].reshape(-1, self.num_replicas, self.batch_size)[:, self.rank].reshape(-1)
        rest = order[whole : self.num_used].reshape(self.num_replicas, -1)[self.rank]
        return np.concatenate([parts, rest])

    def set_epoch(self, epoch: int) -> None:
        """Ignored: see above."""

    def advance(self, limit: float = math.inf) -> None:
        """A batch of the current epoch reached the trainer, whose epochs have at most `limit` batches."""
        self._taken += 1
        self._limit = int(min(limit, self.num_batches))

    def state_dict(self, pending: int = 0) -> dict[str, Any]:
        """Where training is; `pending` batches reached the trainer but were not finished."""
        batches = self._skip + self._taken - pending
        over = batches >= self._limit
        return {
            "epoch": self.epoch + over,
            "batches": 0 if over else batches,
            "global_batch_size": self.num_replicas * self.batch_size,
            "num_samples": self.dataset_size,
            "seed": self.seed,
            "order": self.order_name,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there: the next `__iter__` gives the rest of that epoch.

        With another batch size or number of devices the same samples are skipped, rounded down to whole
        batches.
        """
        changed = [
            f"{name} was {state[name]}, is {own}"
            for name, own in (
                ("num_samples", self.dataset_size),
                ("seed", self.seed),
                ("order", self.order_name),
            )
            if state.get(name, own) != own  # earlier checkpoints name no order
        ]
        self.epoch, self._skip, self._taken = state["epoch"], 0, 0
        if changed:
            self.epoch += 1
            warnings.warn(
                f"the order of samples changed since the checkpoint ({'; '.join(changed)}): going on with a "
                "new epoch instead of the exact batch",
                stacklevel=2,
            )
            return
        self._skip = state["batches"] * state["global_batch_size"] // (self.num_replicas * self.batch_size)


class WatchedLoader(DataLoader[Batch]):
    """A DataLoader whose iteration raises RuntimeError where a worker was killed, also while it handed over a
    batch."""

    def __iter__(self) -> Any:
        batches = super().__iter__()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (ConnectionError, EOFError) as error:
                raise RuntimeError(
                    "A data worker exited or was killed while it handed over a batch (is memory short? lower "
                    "data.num_workers or data.batch_size); ckpt=last goes on at this batch"
                ) from error
            yield batch


class ResumableLoader(WatchedLoader):
    """A loader that can say where it is, so that Lightning does not warn that it cannot."""

    sampler: EpochSampler

    def __init__(
        self, dataset: WindowDataset, sampler: EpochSampler, *, state: Callable[[], dict], **options: Any
    ) -> None:
        super().__init__(
            dataset, batch_size=sampler.batch_size, sampler=sampler, collate_fn=whole_batch, **options
        )
        self._state = state

    def state_dict(self) -> dict[str, int]:
        return self._state()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.load_state_dict(state)


def whole_batch(batch: Any) -> Batch:
    """The collate of a dataset whose `__getitems__` gives whole batches."""
    return sent(batch)
