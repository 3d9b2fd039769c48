"""A curriculum's three kinds, by counts of what was trained on, and over a resume."""

import numpy as np
import pytest
from small_runs import FRAMES, SPEC, losses, rows
from small_runs import fit as run_small

from librobot.data.mixture import MixtureSource
from librobot.data.sources.lerobot import LeRobotSource
from librobot.data.step_order import StepOrder
from librobot.data.writer import LeRobotWriter
from librobot.errors import LibrobotError
from librobot.training.callbacks.curriculum import Curriculum, within

WITH = "callbacks=[default,curriculum]"


def numbered(root, lengths, tasks):
    with LeRobotWriter(root, SPEC, fps=10) as writer:
        for length, task in zip(lengths, tasks, strict=True):
            writer.add_episode(
                images={"front": np.zeros((length, 32, 32, 3), np.uint8)},
                state=np.zeros((length, 2), np.float32),
                action=np.zeros((length, 2), np.float32),
                task=task,
            )
    return LeRobotSource(root)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    return MixtureSource(
        {
            "easy": numbered(root / "easy", [5, 15], ["reach it", "push it"]),
            "hard": numbered(root / "hard", [20, 8], ["reach it", "stack them"]),
        },
        fields={"easy": {"embodiment": "stick"}, "hard": {"embodiment": "stick"}},
    )


def drawn(source, curriculum, batch=10, epochs=3):
    """The dataset, prompt and episode length of each sample, step by step."""
    all_rows = np.arange(int(source.episode_lengths.sum()))
    groups, shares = curriculum.groups(source, all_rows)
    order = StepOrder(groups, shares, seed=3, batch=batch)
    taken = np.concatenate([order.indices(e)[: len(order) // batch * batch] for e in range(epochs)])
    steps = taken.reshape(-1, batch)
    episode = np.searchsorted(np.cumsum(source.episode_lengths), steps, side="right")
    return source.dataset(steps), np.array(source.prompts(steps.reshape(-1))).reshape(steps.shape), episode


def test_shares_of_datasets_move_from_one_to_the_other(source):
    weights = {0: {"easy": 1.0, "hard": 0.0}, 4: {"easy": 0.5, "hard": 0.5}, 8: {"hard": 1.0}}
    datasets, _, _ = drawn(source, Curriculum(weights=weights))
    hard = (datasets == 1).sum(axis=1)
    for step, count in enumerate(hard):
        assert abs(count - 10 * min(step, 8) / 8) < 1
    assert (hard[0], hard[4], hard[8]) == (0, 5, 10)


def test_tasks_until_a_step(source):
    stages = [{"until": 3, "prompts": ["reach*"]}, {"until": 6, "max_length": 8, "datasets": ["easy"]}]
    datasets, prompts, episode = drawn(source, Curriculum(tasks=stages))
    assert set(prompts[:3].ravel()) == {"reach it"}
    assert set(datasets[:3].ravel()) == {0, 1}
    assert set(episode[3:6].ravel()) == {0}  # the one short episode of the easy dataset
    assert set(prompts[6:].ravel()) == {"reach it", "push it", "stack them"}


def test_every_sample_of_a_group_comes_once_before_any_comes_twice(source):
    order = StepOrder([np.arange(7), np.arange(7, 20)], lambda _: np.array([0.5, 0.5]), seed=0, batch=4)
    taken = np.concatenate([order.indices(epoch) for epoch in range(4)])
    first = taken[taken < 7]
    assert [sorted(first[i : i + 7]) for i in range(0, 28, 7)] == [list(range(7))] * 4
    again = StepOrder([np.arange(7), np.arange(7, 20)], lambda _: np.array([0.5, 0.5]), seed=0, batch=4)
    assert (again.indices(3) == taken[60:]).all()  # without the epochs before


def test_a_run_with_a_curriculum_resumes_exactly(dataset, tmp_path):
    options = [
        WITH,
        "+callbacks.curriculum.horizon={0: 1, 3: 2, 14: null}",
        "+callbacks.curriculum.tasks=[{until: 5, prompts: ['reach*']}]",
    ]
    run_small(dataset, tmp_path / "whole", *options, "trainer.max_steps=16")
    run_small(dataset, tmp_path / "cut", *options, "trainer.max_steps=7")
    run_small(dataset, tmp_path / "cut", *options, "trainer.max_steps=16", "ckpt=last")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    counted = [float(row["curriculum/horizon"]) for row in rows(tmp_path / "whole")]
    assert counted == [1.0] * 3 + [2.0] * 11 + [4.0] * 2
    assert FRAMES == 48  # an epoch is 12 steps: the resumed one is in the middle of the first


def test_steps_are_those_of_the_trainer_in_epochs_cut_short(dataset, tmp_path, monkeypatch):
    """Of 12 batches an epoch is trained on 5: two steps of two batches, and one of what is left."""
    seen, shares_of = [], StepOrder._owners
    monkeypatch.setattr(Curriculum, "weights_at", lambda self, step, *given: seen.append(step) or np.ones(1))
    epochs = []

    def owners(self, epoch):
        seen.clear()
        result = shares_of(self, epoch)
        epochs.append((epoch, list(seen)))
        return result

    monkeypatch.setattr(StepOrder, "_owners", owners)
    run_small(
        dataset,
        tmp_path,
        WITH,
        "+callbacks.curriculum.weights={0: {dataset: 1.0}}",
        "trainer.limit_train_batches=0.42",
        "trainer.accumulate_grad_batches=2",
        "trainer.max_steps=7",
    )
    assert len(rows(tmp_path)) == 7
    known = dict(epochs)
    assert known[0][:5] == [0, 0, 1, 1, 2]
    assert known[1][:5] == [3, 3, 4, 4, 5]
    assert known[2][:2] == [6, 6]


def test_samples_behind_the_end_of_a_short_epoch_come_in_the_next():
    group = [np.arange(20)]
    order = StepOrder(group, lambda _: np.ones(1), seed=0, batch=4, batches=2)
    taken = np.concatenate([order.indices(epoch)[:8] for epoch in range(5)])
    assert sorted(taken[:20]) == sorted(taken[20:]) == list(range(20))
    assert [within(limit, 12) for limit in (1.0, 0.5, 5, 50)] == [12, 6, 5, 12]


def test_what_cannot_be_trained_is_said_at_the_start(source):
    every = np.arange(int(source.episode_lengths.sum()))
    with pytest.raises(LibrobotError, match=r"no sample is left to train on at step 0; widen Stage\(until=9"):
        Curriculum(tasks=[{"until": 9, "prompts": ["fly*"]}]).groups(source, every)
    with pytest.raises(LibrobotError, match=r"weights\.0\.esay: did you mean 'easy'"):
        Curriculum(weights={0: {"esay": 1.0}}).groups(source, every)
    with pytest.raises(ValueError, match="needs horizon, weights or tasks"):
        Curriculum()
    with pytest.raises(ValueError, match="horizon: steps from 0 and numbers from 1"):
        Curriculum(horizon={0: 0})
    with pytest.raises(ValueError, match="the first step must be 0, found 5"):
        Curriculum(weights={5: {"easy": 1.0}})
