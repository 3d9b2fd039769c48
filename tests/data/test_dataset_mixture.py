"""Several datasets as one: what each sample is, whose it is, and how often each dataset comes."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import ArraySource
from test_datamodule import Recorder, trainer

from librobot.data.datamodule import DataModule
from librobot.data.mapped import MappedSource
from librobot.data.mixture import MixtureSource
from librobot.data.mixture_order import MixtureOrder, shares_of
from librobot.data.sampler import EpochSampler
from librobot.data.sources.base import Mixture, Source
from librobot.data.sources.lerobot import LeRobotSource
from librobot.errors import LibrobotError
from librobot.normalize import Normalizer
from librobot.types import Camera, Dim, RobotSpec

ARM = RobotSpec(
    "arm",
    (Camera("front", 8, 12), Camera("wrist", 6, 6)),
    tuple(map(Dim, "abcd")),
    tuple(map(Dim, "xyz")),
    10.0,
)
CART = RobotSpec("cart", (Camera("top", 4, 4),), (Dim("s"),), (Dim("v"), Dim("w")), 5.0)


def sources() -> dict[str, Source]:
    return {"arm": ArraySource([30, 20], ARM), "cart": ArraySource([6, 4, 10], CART)}


def test_what_a_dataset_lacks_is_padded_and_masked() -> None:
    mixture = MixtureSource(sources(), fields={"cart": {"cameras": {"front": "top"}}}, action_dim=5)
    assert isinstance(mixture, Source)
    assert isinstance(mixture, Mixture)
    assert mixture.spec.cameras == ARM.cameras  # the largest of a name
    assert (mixture.spec.state_dim, mixture.spec.action_dim) == (4, 5)
    assert [robot.name for robot in mixture.embodiments] == ["arm", "cart"]
    assert mixture.embodiments[1].cameras == (Camera("front", 8, 12),)
    assert mixture.embodiments[1].action_dim == 2
    rows = np.array([53, 3, 50])
    assert mixture.states(rows).tolist() == [[3, 0, 0, 0], [3, 3, 3, 3], [0, 0, 0, 0]]
    assert mixture.actions(rows).tolist() == [[3.5, 3.5, 0, 0, 0], [3.5, 3.5, 3.5, 0, 0], [0.5, 0.5, 0, 0, 0]]
    assert mixture.prompts(rows) == ["task 3", "task 3", "task 0"]
    assert mixture.embodiment(rows).tolist() == [1, 0, 1]
    images, masks = mixture.images(rows), mixture.image_masks(rows)
    assert images["wrist"].max(axis=(1, 2, 3)).tolist() == [0, 3, 0]
    assert images["front"][0].max() == 3  # a square picture, scaled, between black borders
    assert images["front"][0][:, :, 0].max() == 0
    assert masks["wrist"].tolist() == [False, True, False]
    assert masks["front"].all()


def test_a_batch_says_whose_each_sample_is() -> None:
    module = DataModule(MixtureSource(sources()), batch_size=16, drop_last=False)
    module.configure(horizon=3, obs_steps=2)
    batch = next(iter(module.train_dataloader()))
    assert batch.embodiment is not None
    assert batch.embodiment.tolist() == (batch.extra["rows"] >= 50).astype(int).tolist()
    assert batch.observation.image_mask["top"].tolist() == batch.embodiment.bool().tolist()
    assert (batch.actions[batch.embodiment == 1][..., 2] == 0).all()


def test_every_robot_has_its_own_statistics() -> None:
    mixture = MixtureSource(sources())
    normalizer = Normalizer(
        {"state": 4, "action": 3}, {"state": "min_max", "action": "mean_std"}, embodiments=2
    )
    normalizer.fit(DataModule(mixture).statistics)
    ids = torch.from_numpy(mixture.embodiment(np.arange(70)))
    states = normalizer.normalize("state", torch.from_numpy(mixture.states(np.arange(70))), ids)
    for robot, dims in ((0, 4), (1, 1)):
        own = states[ids == robot]
        assert (own[:, :dims].amin(), own[:, :dims].amax()) == (-1, 1)
        assert (own[:, dims:] == 0).all()


def test_datasets_of_one_robot_share_statistics() -> None:
    robot = {"embodiment": "arm"}
    pair = {"a": ArraySource([10], ARM), "b": ArraySource([30], ARM)}
    mixture = MixtureSource(pair, fields={"a": robot, "b": robot})
    assert [spec.name for spec in mixture.embodiments] == ["arm"]
    rows = np.concatenate([np.arange(10), np.arange(30)])
    assert mixture.statistics()["state"]["mean"].tolist() == [rows.mean()] * 4  # type: ignore[call-overload]
    module = DataModule(mixture, batch_size=4)
    module.configure(horizon=1)
    assert next(iter(module.train_dataloader())).embodiment is None
    with pytest.raises(LibrobotError, match=r"'arm' and 'cart' share the robot 'r' but not its state: \['a'"):
        MixtureSource(sources(), fields={key: {"embodiment": "r"} for key in ("arm", "cart")})


def test_fields_choose_order_and_rename() -> None:
    mapped = MappedSource(
        ArraySource([5], ARM),
        cameras=["wrist"],
        state={"grip": "d", "first": "a"},
        action=["z", "x"],
        prompt="go",
        robot="other",
    )
    assert [dim.name for dim in mapped.spec.state] == ["grip", "first"]
    assert [dim.name for dim in mapped.spec.action] == ["z", "x"]
    assert (mapped.spec.name, mapped.spec.camera_names) == ("other", ("wrist",))
    assert list(mapped.images(np.array([1]))) == ["wrist"]
    assert mapped.prompts(np.array([1, 2])) == ["go", "go"]
    assert mapped.statistics()["action"]["max"].shape == (2,)
    with pytest.raises(LibrobotError, match="cameras: none is called 'wrists'; did you mean 'wrist'"):
        MappedSource(ArraySource([5], ARM), cameras={"a": "wrists"})
    with pytest.raises(ValueError, match=r"fields.arm.camera: did you mean 'cameras'"):
        MixtureSource(sources(), fields={"arm": {"camera": []}})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(5, 200), min_size=1, max_size=4),
    st.lists(st.floats(0.05, 1), min_size=4, max_size=4),
    st.integers(1, 4),
)
def test_the_shares_are_those_asked_for(sizes: list[int], weights: list[float], world_size: int) -> None:
    names = [f"d{i}" for i in range(len(sizes))]
    shares = shares_of(names, sizes, dict(zip(names, weights, strict=False)), 1.0)
    starts = np.cumsum([0, *sizes])
    groups = [np.arange(starts[i], starts[i + 1]) for i in range(len(sizes))]
    if (shares * np.floor((np.array(sizes) / shares).min()) < 1).any():
        return  # see below
    order = MixtureOrder(groups, shares, seed=3, names=names)
    for epoch in range(3):
        samples = order.indices(epoch)
        owners = np.searchsorted(starts, samples, side="right") - 1
        assert len(set(samples.tolist())) == len(samples) == len(order)  # none twice
        counts = np.bincount(owners, minlength=len(sizes))
        assert np.abs(counts - shares * len(samples)).max() <= 1
        ranks = [
            EpochSampler(
                len(order),
                2,
                shuffle=True,
                drop_last=False,
                rank=r,
                world_size=world_size,
                order=order.indices,
            ).indices(epoch)
            for r in range(world_size)
        ]
        together = np.concatenate(ranks)
        assert len(set(together.tolist())) == len(together)
    assert (order.indices(1) == order.indices(1)).all()


def test_larger_datasets_go_on_where_they_were() -> None:
    order = MixtureOrder(
        [np.arange(100), np.arange(100, 110)], np.array([0.5, 0.5]), seed=0, names=["a", "b"]
    )
    seen = Counter(sample for epoch in range(10) for sample in order.indices(epoch).tolist())
    assert len(order) == 20
    assert all(seen[sample] == 1 for sample in range(100))
    assert all(seen[sample] == 10 for sample in range(100, 110))
    assert set(order.indices(10).tolist()) != set(order.indices(0).tolist())


def test_temperature_evens_the_shares_out() -> None:
    np.testing.assert_allclose(shares_of("ab", [90, 10], None, 1.0), [0.9, 0.1])
    np.testing.assert_allclose(shares_of("ab", [90, 10], None, 2.0), [0.75, 0.25])
    with pytest.raises(ValueError, match=r"weights.c: valid names: a, b"):
        shares_of("ab", [1, 1], {"a": 1, "c": 1}, 1.0)
    with pytest.raises(ValueError, match="weights: none given for b"):
        shares_of("ab", [1, 1], {"a": 1}, 1.0)
    with pytest.raises(LibrobotError, match=r"'a' would give less than one sample .* when 'b' is used up"):
        MixtureOrder([np.arange(100), np.arange(5)], np.array([0.01, 0.99]), seed=0, names=["a", "b"])


def module(**options: Any) -> DataModule:
    source = MixtureSource(sources(), weights={"arm": 1, "cart": 1})
    made = DataModule(source, **{"batch_size": 4, "seed": 5, **options})
    made.configure(horizon=2)
    return made


class Sees(Recorder):
    def _note(self, batch: Any) -> Any:
        return batch.extra["rows"].tolist(), batch.observation.embodiment.tolist()


@pytest.mark.parametrize("first", [1, 10, 13])
def test_resuming_gives_the_batches_of_the_uninterrupted_run(tmp_path: Path, first: int) -> None:
    """Ten batches an epoch: within the first, at its end, within the second."""
    whole, resumed = Sees(), Sees()
    trainer(tmp_path, max_steps=17).fit(whole, datamodule=module())
    start = trainer(tmp_path, max_steps=first)
    start.fit(Sees(), datamodule=module())
    start.save_checkpoint(tmp_path / "last.ckpt")
    trainer(tmp_path, max_steps=17).fit(resumed, datamodule=module(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.steps == whole.steps[first:]
    seen = Counter(robot for _, robots in whole.steps[:10] for robot in robots)
    assert seen == {0: 20, 1: 20}


def test_every_dataset_keeps_episodes_for_validation() -> None:
    made = module(val_fraction=0.4)
    train, held_out = made.split()
    owners = made.source.dataset_of_episode  # type: ignore[attr-defined]
    assert owners[held_out].tolist() == [0, 1]
    assert sorted([*train, *held_out]) == [0, 1, 2, 3, 4]


def test_factories_are_opened_with_their_own_options(image_dataset: Path) -> None:
    described = {
        "source": partial(LeRobotSource, image_dataset),
        "cameras": ["front"],
        "image_size": [10, 10],
    }
    made = DataModule(
        partial(MixtureSource, {"a": described, "b": ArraySource([9], ARM)}), image_size=[16, 20]
    )
    assert made.spec.cameras[0] == Camera("front", 16, 20)
    assert made.source.images(np.array([0, 21]))["front"].shape == (2, 3, 16, 20)
