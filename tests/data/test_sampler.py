from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from librobot.data.sampler import EpochSampler


def samplers(
    num_samples: int, batch_size: int, world_size: int, *, drop_last: bool = True, seed: int = 3
) -> list[EpochSampler]:
    return [
        EpochSampler(
            num_samples,
            batch_size,
            shuffle=True,
            drop_last=drop_last,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]


@given(
    num_samples=st.integers(1, 60),
    batch_size=st.integers(1, 7),
    world_size=st.integers(1, 4),
    drop_last=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_ranks_share_an_epoch(
    num_samples: int, batch_size: int, world_size: int, drop_last: bool, epoch: int
) -> None:
    ranks = samplers(num_samples, batch_size, world_size, drop_last=drop_last)
    parts = [sampler.indices(epoch).tolist() for sampler in ranks]
    assert {len(part) for part in parts} == {len(ranks[0])}
    everything = [index for part in parts for index in part]
    assert len(set(everything)) == len(everything)
    lost = num_samples - len(everything)
    assert 0 <= lost < (batch_size * world_size if drop_last else world_size)
    assert ranks[0].num_batches == -(-len(parts[0]) // batch_size)


def test_the_ranks_together_see_what_one_device_sees() -> None:
    (single,) = samplers(40, 6, 1)
    first, second = samplers(40, 3, 2)
    together = [
        sorted(first.indices(2)[i : i + 3].tolist() + second.indices(2)[i : i + 3].tolist())
        for i in range(0, len(first), 3)
    ]
    alone = [sorted(single.indices(2)[i : i + 6].tolist()) for i in range(0, len(single), 6)]
    assert together == alone


def test_order_depends_on_seed_and_epoch_alone() -> None:
    (a,), (b,), (c,) = samplers(20, 4, 1), samplers(20, 4, 1), samplers(20, 4, 1, seed=4)
    assert a.indices(1).tolist() == b.indices(1).tolist()
    assert a.indices(1).tolist() != a.indices(0).tolist()
    assert a.indices(1).tolist() != c.indices(1).tolist()


def test_it_goes_on_where_the_trainer_is() -> None:
    (sampler,) = samplers(8, 2, 1)
    assert list(sampler) == list(sampler) == sampler.indices(0).tolist()
    sampler.advance()
    assert list(sampler) == sampler.indices(0)[2:].tolist()
    for _ in range(3):
        sampler.advance()
    assert list(sampler) == sampler.indices(1).tolist()


def test_resume_gives_the_rest_of_the_epoch() -> None:
    (sampler,), (resumed,) = samplers(10, 2, 1), samplers(10, 2, 1)
    for _ in range(3):
        sampler.advance()
    resumed.load_state_dict(sampler.state_dict())
    assert list(resumed) == sampler.indices(0)[6:].tolist()
    assert resumed.state_dict() == sampler.state_dict()
    resumed.load_state_dict(sampler.state_dict(pending=1))  # the third batch's step did not finish
    assert list(resumed) == sampler.indices(0)[4:].tolist()


def test_resume_at_the_end_of_an_epoch_starts_the_next() -> None:
    (sampler,), (resumed,) = samplers(4, 2, 1), samplers(4, 2, 1)
    for _ in range(2):
        sampler.advance()
    resumed.load_state_dict(sampler.state_dict())
    assert list(resumed) == sampler.indices(1).tolist()


def test_a_limit_ends_an_epoch() -> None:
    (sampler,) = samplers(8, 2, 1)
    sampler.advance(limit=1)
    assert sampler.state_dict()["epoch"] == 1
    assert list(sampler) == sampler.indices(1)[:2].tolist()


def test_resume_on_more_devices_skips_the_same_samples() -> None:
    (alone,) = samplers(24, 4, 1)
    for _ in range(4):
        alone.advance()
    ranks = samplers(24, 4, 2)
    for rank in ranks:
        rank.load_state_dict(alone.state_dict())
    rest = [index for rank in ranks for index in rank]
    assert sorted(rest) == sorted(alone.indices(0)[16:].tolist())


def test_resume_with_other_data_starts_an_epoch_and_warns() -> None:
    (sampler,), (other,) = samplers(10, 2, 1), samplers(12, 2, 1)
    sampler.advance()
    with pytest.warns(UserWarning, match="num_samples was 10, is 12"):
        other.load_state_dict(sampler.state_dict())
    assert sorted(other) == list(np.arange(12))
