"""order=blocks: neighbours in one batch, every sample once, and what that costs in randomness."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_datamodule import Recorder, trainer

from librobot.data.block_order import BlockOrder, batch_spread
from librobot.data.datamodule import DataModule
from librobot.errors import LibrobotError


@given(
    lengths=st.lists(st.integers(1, 23), min_size=1, max_size=8),
    block=st.integers(1, 6),
    epoch=st.integers(0, 3),
)
def test_every_sample_once_and_blocks_whole(lengths: list[int], block: int, epoch: int) -> None:
    owner = np.repeat(np.arange(len(lengths)), lengths)
    order = BlockOrder(owner, block, seed=1).indices(epoch)
    assert sorted(order.tolist()) == list(range(len(owner)))
    offset = np.concatenate([np.arange(length) for length in lengths])
    # Every stretch of a batch that starts at a multiple of the block holds the whole block of its neighbours.
    for stretch in order[: len(order) // block * block].reshape(-1, block):
        if offset[stretch[0]] + block <= lengths[owner[stretch[0]]] and offset[stretch[0]] % block == 0:
            assert stretch.tolist() == list(range(stretch[0], stretch[0] + block))


def test_the_order_is_the_seeds_and_the_epochs() -> None:
    owner = np.repeat(np.arange(4), 30)
    a, b, c = (BlockOrder(owner, 2, seed=seed) for seed in (1, 1, 2))
    assert a.indices(3).tolist() == b.indices(3).tolist()
    assert a.indices(3).tolist() != a.indices(2).tolist()
    assert a.indices(3).tolist() != c.indices(3).tolist()


def test_the_spread_of_batches_is_one_for_a_shuffle_and_grows_with_the_block() -> None:
    rng = np.random.default_rng(0)
    states = np.concatenate([np.cumsum(rng.normal(size=(200, 6)), axis=0) / 20 for _ in range(60)])
    owner = np.repeat(np.arange(60), 200)
    shuffled = batch_spread(rng.permutation(len(states)), states, 32)
    spreads = [batch_spread(BlockOrder(owner, block, seed=0).indices(0), states, 32) for block in (1, 2, 8)]
    assert shuffled == pytest.approx(1, abs=0.15)
    assert spreads[0] == pytest.approx(1, abs=0.15)
    assert spreads[1] == pytest.approx(2, abs=0.3)  # neighbours are nearly copies: half as many samples
    assert spreads[2] == pytest.approx(8, abs=1.2)
    assert batch_spread(np.arange(len(states)), states, 32) > 20


def test_it_resumes_in_the_middle_of_an_epoch(array_source: Callable, tmp_path: Path) -> None:
    source = array_source([6, 5, 7])

    def module() -> DataModule:
        made = DataModule(source, batch_size=4, seed=5, order="blocks", block_frames=2)
        made.configure(horizon=2)
        return made

    whole, resumed = Recorder(), Recorder()
    trainer(tmp_path, max_steps=9).fit(whole, datamodule=module())
    first = trainer(tmp_path, max_steps=6)
    first.fit(Recorder(), datamodule=module())
    first.save_checkpoint(tmp_path / "last.ckpt")
    trainer(tmp_path, max_steps=9).fit(resumed, datamodule=module(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.steps == whole.steps[6:]
    rows = np.array([rows for rows, _ in whole.steps[:4]])
    assert (np.diff(np.sort(rows, axis=1), axis=1) == 1).sum() >= 6
    other = DataModule(source, batch_size=4, seed=5)
    other.configure(horizon=2)
    with pytest.warns(UserWarning, match="order was blocks of 2, is shuffle"):
        trainer(tmp_path, max_steps=9).fit(Recorder(), datamodule=other, ckpt_path=tmp_path / "last.ckpt")


def test_what_it_does_not_take(array_source: Callable) -> None:
    with pytest.raises(ValueError, match="multiple of block_frames=3"):
        DataModule(array_source([6]), batch_size=4, order="blocks", block_frames=3)
    with pytest.raises(ValueError, match="shuffle or blocks, found 'random'"):
        DataModule(array_source([6]), order="random")  # type: ignore[arg-type]
    from librobot.data.mixture import MixtureSource

    mixed = MixtureSource({"a": array_source([6]), "b": array_source([6])})
    module = DataModule(mixed, batch_size=2, order="blocks")
    module.configure(horizon=2)
    with pytest.raises(LibrobotError, match="a mixture is shuffled"):
        module.train_dataloader()
    alone = DataModule(array_source([6]), batch_size=2, order="blocks")
    alone.configure(horizon=2)
    alone.make_order = lambda *_: None  # type: ignore[assignment, return-value]
    with pytest.raises(LibrobotError, match="a curriculum decides about each batch"):
        alone.train_dataloader()
    with pytest.raises(ValueError, match="bucket=8 samples of like length: set bucket=0, or order=shuffle"):
        DataModule(array_source([6]), batch_size=2, order="blocks", bucket=8)
