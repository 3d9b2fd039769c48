import subprocess
import sys

import numpy as np
import pytest
from fake_suite import FakePolicy, FakeSuite

from librobot.errors import LibrobotError
from librobot.evaluation.controls import blank_images, shuffled_prompts
from librobot.evaluation.episode import plan
from librobot.evaluation.pool import EnvPool
from librobot.evaluation.rollout import ExpertPolicy, TimedPolicy, evaluate_policy
from librobot.evaluation.worker import Reset, Step
from librobot.sim.base import DEMONSTRATION_SEEDS, EVALUATION_SEEDS
from librobot.types import Camera, RobotSpec


def test_plan_shares_kinds_equally_on_unseen_scenes():
    planned = plan(FakeSuite(kinds=("a", "b", "c")), 10, seed=2)
    assert len(planned) == 12  # rounded up to an equal share
    assert [episode.kind for episode in planned[:4]] == ["a", "b", "c", "a"]
    assert [episode.seed for episode in planned] == list(range(1_200_000, 1_200_012))
    assert all(e.seed in EVALUATION_SEEDS and e.seed not in DEMONSTRATION_SEEDS for e in planned)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["wlk"]}, "did you mean 'walk'"),
        ({"kinds": []}, "at least one is needed"),
        ({"seed": 10}, "seed goes from 0 to 9"),
        ({"seed": -1}, "seed goes from 0 to 9"),
    ],
)
def test_plan_refuses(options, message):
    with pytest.raises(LibrobotError, match=message):
        plan(FakeSuite(), 4, **options)


def test_a_policy_that_looks_succeeds():
    timed = TimedPolicy(FakePolicy())
    results = evaluate_policy(timed, FakeSuite(), episodes=12, num_envs=4, progress=False)
    assert [r.index for r in results] == list(range(12))
    assert [r.kind for r in results[:2]] == ["walk", "run"]
    assert sum(r.success for r in results) == 12
    assert all(r.prompt.startswith(r.kind) and 1 <= r.length < 30 for r in results)
    assert not any(r.frames for r in results)
    assert timed.calls[0].batch_size == 4
    assert sum(call.batch_size for call in timed.calls) == sum(-(-r.length // 6) for r in results)


def test_results_do_not_depend_on_the_number_of_environments():
    def outcome(num_envs, num_workers):
        suite = FakeSuite(limit=4)  # some succeed, some do not
        results = evaluate_policy(
            FakePolicy(), suite, episodes=8, num_envs=num_envs, num_workers=num_workers, progress=False
        )
        return [(r.seed, r.kind, r.prompt, r.success, r.length) for r in results]

    expected = outcome(1, 1)
    assert len({success for *_, success, _ in expected}) == 2
    assert outcome(5, 2) == expected


@pytest.mark.parametrize(("options", "calls"), [({"execute_steps": 2}, 5), ({"ensemble": 0.01}, 10), ({}, 2)])
def test_how_often_the_policy_is_asked(options, calls):
    policy = FakePolicy(words=True)
    away = lambda observation, episode: {**observation, "prompt": "stay"}  # noqa: E731
    suite = FakeSuite(limit=10, kinds=("walk",))
    (result,) = evaluate_policy(policy, suite, episodes=1, transform=away, progress=False, **options)
    assert (result.length, result.success) == (10, False)
    assert len(policy.batches) == calls


def test_history_is_stacked_and_padded():
    with EnvPool(FakeSuite(), 1, history=3) as pool:
        first = pool.run({0: Reset("walk", 1)})[0].observation
        assert first["images"]["top"].shape == (3, 16, 16, 3)
        assert (first["state"] == first["state"][0]).all()
        actions = np.array([[1, 0], [0, 1]], np.float32)
        later = pool.run({0: Step(actions)})[0].observation
    moved = np.diff(later["state"], axis=0)
    np.testing.assert_allclose(moved, 0.2 * actions, atol=1e-6)
    results = evaluate_policy(FakePolicy(obs_steps=3), FakeSuite(), episodes=2, progress=False)
    assert all(r.success for r in results)


def test_the_expert_runs_through_the_same_loop():
    results = evaluate_policy(ExpertPolicy(), FakeSuite(), episodes=6, num_envs=3, progress=False)
    assert all(r.success for r in results)


def test_first_episode_of_each_kind_is_recorded():
    results = evaluate_policy(FakePolicy(), FakeSuite(), episodes=6, videos_per_kind=1, progress=False)
    assert [bool(r.frames) for r in results] == [True, True] + [False] * 4
    assert len(results[0].frames) == results[0].length + 1  # the first picture too
    assert results[0].frames[0].shape == (192, 192, 3)


def test_controls_take_away_what_the_policy_needs():
    policy, suite = FakePolicy(words=True), FakeSuite()
    options = {"episodes": 12, "num_envs": 4, "progress": False}
    main = evaluate_policy(policy, suite, **options)
    blank = evaluate_policy(policy, suite, transform=blank_images, **options)
    shuffled = evaluate_policy(policy, suite, transform=shuffled_prompts(main), **options)
    assert sum(r.success for r in main) == 12
    assert sum(r.success for r in blank) <= 2  # an episode may start on its goal
    assert [r.prompt for r in shuffled] == [r.prompt for r in main]  # the scene's true instruction
    changed = [r for r in shuffled if not r.success]
    assert len(changed) >= 6


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("reset", "kind 'walk', seed 1000000, step 0: RuntimeError: the scene is broken"),
        ("step", "step 2: ValueError: the simulation diverged"),
        ("exit", r"ended by itself \(exit code 7\)"),
    ],
)
def test_a_failing_environment_is_one_clear_error(fail, message):
    with pytest.raises(LibrobotError, match=message):
        evaluate_policy(
            FakePolicy(words=True), FakeSuite(fail=fail), episodes=1, kinds=["walk"], progress=False
        )


def test_workers_import_no_torch():
    code = "import sys, librobot.evaluation.worker; sys.exit('torch' in sys.modules or 'av' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_processes_end_with_the_pool():
    pool = EnvPool(FakeSuite(), 3, num_workers=2)
    pool.run({slot: Reset("walk", slot) for slot in range(3)})
    pool.close()
    assert [worker.process.poll() for worker in pool.workers] == [0, 0]


def test_unpicklable_suite_is_refused():
    suite = FakeSuite()
    suite.scene = lambda: None
    with pytest.raises(LibrobotError, match="cannot be sent to the environment processes"):
        EnvPool(suite, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": (Camera("tip", 16, 16),)}, "camera 'tip'; did you mean 'top'"),
        ({"cameras": (Camera("top", 32, 32),)}, "32 x 32 pixels in training and gives 16 x 16"),
        ({"action": ({"name": "x"},)}, r"action dimensions are \['x'\]"),
        ({"state": ({"name": "y"}, {"name": "x"})}, r"state dimensions are \['y', 'x'\]"),
    ],
)
def test_a_policy_for_another_robot_is_refused(change, message):
    policy = FakePolicy()
    policy.spec = RobotSpec(**{**policy.spec.to_dict(), **change})
    with pytest.raises(LibrobotError, match=message):
        evaluate_policy(policy, FakeSuite(), episodes=2, progress=False)


def test_too_many_execute_steps_are_refused():
    with pytest.raises(LibrobotError, match="execute_steps must lie between 1"):
        evaluate_policy(FakePolicy(), FakeSuite(), episodes=2, execute_steps=7, progress=False)


def test_noise_depends_on_the_scene_and_the_moment_only():
    class Noted(FakePolicy):
        def infer_batch(self, observations):
            seeds.extend(observation["seed"] for observation in observations)
            return super().infer_batch(observations)

    found = []
    for num_envs in (1, 3):
        seeds: list[int] = []
        evaluate_policy(
            Noted(words=True),
            FakeSuite(limit=12),
            episodes=4,
            num_envs=num_envs,
            num_workers=1,
            progress=False,
        )
        found.append(sorted(seeds))
    assert found[0] == found[1]
    assert len(set(found[0])) == len(found[0])
