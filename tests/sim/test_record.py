"""Recording demonstrations: what is stored, resuming, and independence of the number of workers."""

import json

import numpy as np
import pytest

from librobot.data.sources.lerobot import LeRobotSource
from librobot.errors import LibrobotError
from librobot.sim.base import DEMONSTRATION_SEEDS, EVALUATION_SEEDS
from librobot.sim.record import EpisodeRecorder, ensure_demonstrations, record_demonstrations
from librobot.sim.tabletop import TabletopSuite


@pytest.fixture(scope="module")
def suite() -> TabletopSuite:
    return TabletopSuite(image_size=16, renderer="rays", kinds=("reach", "press"))


def test_demonstration_and_evaluation_scenes_are_apart() -> None:
    assert not set(DEMONSTRATION_SEEDS) & set(EVALUATION_SEEDS)


def test_the_clean_action_is_stored(suite) -> None:
    """With noise, the stored action is what the expert says in the recorded state, not what was executed."""
    recorder = EpisodeRecorder(suite, kinds=suite.kinds, seed=0, noise=1.0)
    noisy = next(d for d in map(recorder, range(10)) if len(d.action) > 4)
    tip, target = noisy.state[:, 6:9], noisy.action[:, :3]
    assert (np.linalg.norm(target - tip, axis=1) <= 0.0451).all()  # the expert's longest step, in m
    assert noisy.prompt.split()[0] in ("reach", "press")


def test_workers_do_not_change_the_dataset(suite, tmp_path) -> None:
    alone = record_demonstrations(suite, tmp_path / "alone", episodes=6, num_workers=1)
    shared = record_demonstrations(suite, tmp_path / "shared", episodes=6, num_workers=2)
    first, second = LeRobotSource(alone), LeRobotSource(shared)
    rows = np.arange(int(first.episode_lengths.sum()))
    assert (first.episode_lengths == second.episode_lengths).all()
    assert (first.actions(rows) == second.actions(rows)).all()
    assert (first.images(rows)["front"] == second.images(rows)["front"]).all()
    assert first.spec == suite.spec
    assert json.loads((alone / "meta" / "librobot.json").read_text())["renderer"] == "mujoco-rays"


def test_an_interrupted_recording_goes_on(suite, tmp_path, monkeypatch) -> None:
    whole = record_demonstrations(suite, tmp_path / "whole", episodes=5)
    play = EpisodeRecorder.__call__

    def interrupted(self, index):
        if index == 3:
            raise KeyboardInterrupt
        return play(self, index)

    monkeypatch.setattr(EpisodeRecorder, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record_demonstrations(suite, tmp_path / "cut", episodes=5)
    assert len(LeRobotSource(tmp_path / "cut").episode_lengths) == 3
    monkeypatch.undo()
    again = record_demonstrations(suite, tmp_path / "cut", episodes=5)
    first, second = LeRobotSource(whole), LeRobotSource(again)
    rows = np.arange(int(first.episode_lengths.sum()))
    assert (first.actions(rows) == second.actions(rows)).all()


def test_demonstrations_are_recorded_once(suite, tmp_path, monkeypatch) -> None:
    root = ensure_demonstrations(suite, episodes=2, cache_dir=tmp_path)
    monkeypatch.setattr(EpisodeRecorder, "__call__", lambda *_: pytest.fail("recorded again"))
    assert ensure_demonstrations(suite, episodes=2, cache_dir=tmp_path) == root
    with pytest.raises(pytest.fail.Exception):
        ensure_demonstrations(suite, episodes=2, cache_dir=tmp_path, noise=0.5)


def test_impossible_numbers(suite, tmp_path) -> None:
    with pytest.raises(LibrobotError, match="episodes >= 1"):
        record_demonstrations(suite, tmp_path, episodes=0)
    with pytest.raises(LibrobotError, match="lower episodes or seed"):
        EpisodeRecorder(suite, kinds=suite.kinds, seed=DEMONSTRATION_SEEDS.stop, noise=0.0)(0)
