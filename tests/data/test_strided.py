"""`data.stride`: what a strided action is, whatever the dataset, and where it shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from synthetic import ArraySource

from librobot.config.build import build_datamodule, build_spec
from librobot.config.compose import compose
from librobot.data.datamodule import DataModule
from librobot.data.mixture import MixtureSource
from librobot.data.sources.lerobot import LeRobotSource
from librobot.data.statistics import vector_statistics
from librobot.data.strided import StridedSource, strided, strides_of
from librobot.errors import LibrobotError
from librobot.types import Camera, Dim, RobotSpec

ARM = RobotSpec(
    "arm",
    (Camera("front", 8, 8),),
    (Dim("x"), Dim("y")),
    (Dim("x", "m", "ee_position", "delta", low=-1.0, high=2.0), Dim("target", "m"), Dim("gripper")),
    12.0,
)


class Random(ArraySource):
    """States and actions that differ everywhere."""

    def __init__(self, lengths: list[int], spec: RobotSpec = ARM, scale: float = 1.0) -> None:
        super().__init__(lengths, spec)
        draw = np.random.default_rng(3)
        total = sum(lengths)
        self.acted = (scale * draw.normal(size=(total, spec.action_dim))).astype(np.float32)
        self.seen = draw.normal(size=(total, spec.state_dim)).astype(np.float32)

    def actions(self, rows: np.ndarray) -> np.ndarray:
        return self.acted[rows]

    def states(self, rows: np.ndarray) -> np.ndarray:
        return self.seen[rows]


def module(source: Any, horizon: int = 3, obs_steps: int = 2, offset: int = 0, **options: Any) -> DataModule:
    made = DataModule(source, batch_size=4, **options)
    made.configure(horizon=horizon, obs_steps=obs_steps, action_offset=offset)
    return made


def sample(made: DataModule, index: list[int]) -> Any:
    episodes = np.arange(len(made.source.episode_lengths))
    return made._dataset(episodes, shuffle=False, drop_last=False)[0].__getitems__(index)


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=4),
    stride=st.integers(1, 5),
    horizon=st.integers(1, 4),
    obs_steps=st.integers(1, 3),
    data=st.data(),
)
def test_samples_are_what_a_robot_at_that_rate_would_record(
    lengths: list[int], stride: int, horizon: int, obs_steps: int, data: st.DataObject
) -> None:
    """By definition, frame by frame: sums of changes, last targets, observations strides apart."""
    offset = data.draw(st.integers(1 - horizon, 0))
    source = Random(lengths)
    made = module(source, horizon, obs_steps, offset, stride=stride)
    total = sum(lengths)
    batch = sample(made, list(range(total)))
    ends = np.cumsum(lengths)
    for row in range(total):
        episode = int(np.searchsorted(ends, row, side="right"))
        first, end = ends[episode] - lengths[episode], ends[episode]
        seen = [max(first, row - back * stride) for back in reversed(range(obs_steps))]
        np.testing.assert_array_equal(batch.observation.state[row], source.seen[seen])
        for k in range(horizon):
            begin = row + (offset + k) * stride
            assert bool(batch.action_mask[row, k]) == (first <= begin < end)
            if first <= begin < end:
                covered = source.acted[begin : min(begin + stride, end)]
                expected = [covered[:, 0].sum(), covered[-1, 1], covered[-1, 2]]
                np.testing.assert_allclose(batch.actions[row, k], expected, rtol=1e-5, atol=1e-6)
    assert made.spec.control_hz == pytest.approx(12.0 / stride)


def test_following_a_strided_chunk_leads_where_the_recorded_one_does() -> None:
    """Changes of every stride from a frame on add up to those of the whole episode."""
    source = Random([10, 7])
    made = module(source, horizon=4, stride=3)
    actions, mask = (x[0] for x in (lambda b: (b.actions, b.action_mask))(sample(made, [10])))
    assert mask.tolist() == [True, True, True, False]
    assert float(actions[mask, 0].sum()) == pytest.approx(float(source.acted[10:17, 0].sum()), rel=1e-5)
    assert actions[2, 1] == source.acted[16, 1], "the last stride is shorter, and ends where the episode does"


def test_the_rate_and_the_limits_are_those_of_strides() -> None:
    source = StridedSource(Random([6]), 3)
    assert source.spec.control_hz == 4.0
    assert (source.spec.action[0].low, source.spec.action[0].high) == (-3.0, 6.0)
    assert source.spec.action[1] == ARM.action[1]
    assert source.provenance == {"root": "memory", "stride": 3, "recorded_hz": 12.0}
    assert strided(source.source, 1) is source.source


def test_statistics_are_those_of_strided_actions() -> None:
    source = Random([9, 5, 1])
    made = module(source, stride=4)
    found, rows = made.statistics, np.arange(15)
    every = StridedSource(source, 4).actions(rows)
    for name, value in vector_statistics(every).items():
        np.testing.assert_allclose(found["action"][name], value)
    np.testing.assert_allclose(found["state"]["mean"], source.seen.mean(axis=0), rtol=1e-5)
    assert found["action"]["std"][0] > 1.3 * vector_statistics(source.acted)["std"][0]


def test_how_a_policy_sees_actions_is_of_strides() -> None:
    """actions=delta: each target less the one a stride before it; its statistics too."""
    from librobot.representation import ActionRepresentation

    spec = replace(ARM, state=(Dim("target", "m"),), action=(Dim("target", "m"),))
    source = Random([12], spec)
    made = DataModule(source, batch_size=4, stride=3)
    seen = ActionRepresentation([{"dims": ["target"], "frame": "delta"}]).bind(made.spec, None)
    made.configure(horizon=3, obs_steps=1, representation=seen)
    actions = sample(made, [1]).actions[0, :, 0].numpy()
    reached = source.acted[[3, 6, 9], 0]
    np.testing.assert_allclose(actions, np.diff(reached, prepend=source.seen[1, 0]), rtol=1e-5)
    every = np.concatenate([b.actions[b.action_mask] for b in [sample(made, list(range(12)))]])
    np.testing.assert_allclose(made.statistics["action"]["std"], every.std(axis=0), rtol=1e-4)


TURNS = {
    "axis_angle": (lambda x: Rotation.from_rotvec(x), lambda r: r.as_rotvec()),
    "euler": (lambda x: Rotation.from_euler("xyz", x), lambda r: r.as_euler("xyz")),
}


@pytest.mark.parametrize("unit", ["rad", "deg"])
@pytest.mark.parametrize("kind", TURNS)
def test_turns_are_composed(kind: str, unit: str) -> None:
    read, written = TURNS[kind]
    scale = 1.0 if unit == "rad" else np.pi / 180
    turn = tuple(Dim(f"r{axis}", unit, "ee_rotation", "delta") for axis in "xyz")
    source = Random([8], replace(ARM, action=(Dim("x", mode="delta"), *turn)), scale=0.3 / scale)
    found = StridedSource(source, 3, kind).actions(np.array([0, 4, 6]))  # type: ignore[arg-type]
    for row, rows in zip(found, ([0, 1, 2], [4, 5, 6], [6, 7]), strict=True):
        whole = Rotation.identity()
        for r in rows:
            whole = read(scale * source.acted[r, 1:]) * whole
        np.testing.assert_allclose(scale * row[1:], written(whole), atol=1e-5)
        assert row[0] == pytest.approx(float(source.acted[rows, 0].sum()), rel=1e-5)
    added = StridedSource(source, 3, "sum").actions(np.array([0]))
    np.testing.assert_allclose(added[0], source.acted[:3].sum(axis=0), rtol=1e-5)
    assert np.abs(added[0, 1:] - found[0, 1:]).max() > 0.02 / scale


def test_every_dataset_of_a_mixture_has_its_own_stride() -> None:
    """Two robots brought to one rate; the mixture's own stride is for those that name none."""
    fast, slow = Random([9, 4]), Random([7], replace(ARM, control_hz=4.0))
    described = {"source": lambda **options: fast, "stride": 3}
    mixture = MixtureSource({"fast": described, "slow": slow})
    assert [robot.control_hz for robot in mixture.embodiments] == [4.0, 4.0]
    assert strides_of(mixture).tolist() == [3, 3, 1]
    batch = sample(module(mixture), [0, 13])
    np.testing.assert_allclose(batch.actions[0, 1, 0], fast.acted[3:6, 0].sum(), rtol=1e-5)
    np.testing.assert_array_equal(batch.actions[1], slow.acted[:3])
    both = module(mixture, stride=2)
    assert strides_of(both.source).tolist() == [3, 3, 2]
    assert [robot.control_hz for robot in both.source.embodiments] == [4.0, 2.0]
    assert both.statistics[1]["action"]["std"][0] > both.statistics[1]["action"]["std"][1]
    order = both._dataset(np.arange(3), shuffle=True, drop_last=True)[1]
    assert len(set(order)) > 0


def test_a_mixtures_fields_are_kept() -> None:
    fields = {"a": {"action": {"dx": "x"}, "prompt": "go", "embodiment": "one"}}
    mixture = MixtureSource({"a": Random([6])}, fields=fields).with_stride(2)
    assert [dim.name for dim in mixture.spec.action] == ["dx"]
    assert mixture.prompts(np.array([0])) == ["go"]
    assert mixture.spec.name == "one"
    assert mixture.spec.control_hz == 6.0


@pytest.mark.parametrize("cache", ["none", "memmap"])
def test_pictures_and_caches_are_by_frame(image_dataset: Path, tmp_path: Path, cache: str) -> None:
    opened = partial(LeRobotSource, image_dataset, cache_dir=tmp_path)
    plain = LeRobotSource(image_dataset)
    batch = sample(module(opened, stride=2, cache=cache), [4, 9, 10])  # episodes of 5, 1, 8, 6 frames
    for name, frames in batch.observation.images.items():
        for i, rows in enumerate(([2, 4], [7, 9], [8, 10])):
            np.testing.assert_array_equal(frames[i], plain.images(np.array(rows))[name])


def test_blocks_hold_neighbouring_frames(array_source: Callable) -> None:
    made = module(array_source([10, 8]), stride=3, order="blocks", block_frames=2)
    order = np.array(list(made._dataset(np.arange(2), shuffle=True, drop_last=True)[1])).reshape(-1, 2)
    assert (np.diff(order, axis=1) == 1).all()
    assert sorted(order.flatten().tolist())[: order.size] == sorted(set(order.flatten().tolist()))


def test_no_phase_of_an_episode_leaks_into_validation(array_source: Callable) -> None:
    made = module(array_source([10, 8, 6, 9]), stride=3, val_fraction=0.5)
    train, val = made.split()
    assert set(train.tolist()) | set(val.tolist()) == {0, 1, 2, 3}
    assert not set(train.tolist()) & set(val.tolist())


@pytest.mark.parametrize("data", ["lerobot", "hdf5", "libero", "aloha", "zarr", "rlds", "oxe_bridge", "mcap"])
def test_every_format_has_the_option(data: str) -> None:
    cfg = compose([f"data={data}", "data.root=nowhere", "data.stride=3", "data.stride_rotation=sum"])
    assert (cfg.data.stride, cfg.data.stride_rotation) == (3, "sum")
    assert {"cache_build", "cache_limit_gb"} <= set(cfg.data)


def test_the_options_of_a_mixtures_datasets(image_dataset: Path, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("LIBROBOT_CACHE", str(tmp_path))
    part = "data.source.datasets.a"
    options = [f"+data@{part}=lerobot", f"{part}.root={image_dataset}", f"{part}.stride=2"]
    cfg = compose(["data=mixture", *options, f"{part}.cache=memmap", f"{part}.cache_limit_gb=5"])
    source = build_datamodule(cfg).source
    assert strides_of(source).tolist() == [2] * 4
    assert source.spec.control_hz == 5.0
    assert any((tmp_path / "frames").iterdir()), "the dataset's own cache is made"
    whole = build_datamodule(compose(["data=mixture", *options[:2], "data.stride=5"])).source
    assert whole.spec.control_hz == 2.0


def test_a_named_robot_is_compared_at_the_rate_of_strides(image_dataset: Path) -> None:
    made = module(partial(LeRobotSource, image_dataset), stride=2)
    spec = made.spec
    cfg = compose(["data=lerobot", f"data.root={image_dataset}"])
    dims = [{"name": d.name, "mode": d.mode, "kind": d.kind} for d in spec.action]
    cfg.robot = {
        "_target_": "librobot.types.RobotSpec",
        "name": "named",
        "cameras": [{"name": c.name, "height": 8, "width": 8} for c in spec.cameras],
        "state": [{"name": d.name} for d in spec.state],
        "action": dims,
        "control_hz": 10.0,
    }
    with pytest.warns(
        UserWarning, match=r"dataset has 5 strides of 2 frames a second: motions will be 2 times"
    ):
        build_spec(cfg, made.source)


def turning(unit: str = "rad", count: int = 3) -> RobotSpec:
    return replace(ARM, action=tuple(Dim(f"r{i}", unit, "ee_rotation", "delta") for i in range(count)))


@pytest.mark.parametrize(
    ("spec", "options", "error", "message"),
    [
        (ARM, {"stride": 0}, ValueError, "stride must be at least 1, found 0"),
        (
            turning(),
            {"stride": 2},
            LibrobotError,
            r"r0, r1, r2 are changes of a rotation.*data.stride_rotation=",
        ),
        (
            turning(),
            {"stride": 2, "stride_rotation": "matrix"},
            LibrobotError,
            "must be one of sum, axis_angle",
        ),
        (
            turning(count=2),
            {"stride": 2, "stride_rotation": "euler"},
            LibrobotError,
            "euler has 3 numbers for each rotation, found 2",
        ),
        (
            turning(""),
            {"stride": 2, "stride_rotation": "axis_angle"},
            LibrobotError,
            "needs angles in rad or deg, found the unit ''.*take data.stride_rotation=sum",
        ),
    ],
)
def test_what_it_refuses(spec: RobotSpec, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        _ = DataModule(Random([5], spec), **options).source


def test_a_source_that_is_strided_trains_as_any(array_source: Callable) -> None:
    batches = list(module(array_source([9, 8]), stride=2).train_dataloader())
    assert all(torch.isfinite(batch.actions).all() for batch in batches)
    rows = np.concatenate([batch.extra["rows"] for batch in batches])
    assert len(rows) == len(set(rows.tolist())) == 16
