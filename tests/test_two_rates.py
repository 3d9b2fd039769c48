"""Helix at two rates: who runs when, how old a latent is, and that time changes nothing else."""

import threading

import numpy as np
import pytest
import torch

import tiny_models
from librobot.errors import LibrobotError
from librobot.frameworks.slow_thought import one_step
from librobot.policy import Policy
from librobot.two_rates import TwoRatePolicy

CONTROL_HZ = tiny_models.SPEC.control_hz


def moments(count: int) -> list[dict]:
    """What the robot sees at each control step."""
    draw = np.random.default_rng(3)
    return [
        {
            "images": {
                camera.name: draw.integers(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
                for camera in tiny_models.SPEC.cameras
            },
            "state": draw.normal(size=tiny_models.SPEC.state_dim).astype(np.float32),
            "prompt": "reach the red cube",
        }
        for _ in range(count)
    ]


def window(seen: list[dict], now: int, obs_steps: int) -> dict:
    """The window that ends at `now`, the first observation repeated before the start."""
    past = [seen[max(0, step)] for step in range(now - obs_steps + 1, now + 1)]
    return {
        "images": {name: np.stack([o["images"][name] for o in past]) for name in past[0]["images"]},
        "state": np.stack([o["state"] for o in past]),
        "prompt": past[0]["prompt"],
    }


def counted(framework) -> dict[str, int]:
    """How often each system has run."""
    count = {"think": 0, "act": 0, "plan": 0}
    for name in count:
        inner = getattr(framework, name)

        def outer(*args, _inner=inner, _name=name, **options):
            count[_name] += 1
            return _inner(*args, **options)

        object.__setattr__(framework, name, outer)
    return count


@pytest.mark.parametrize("obs_steps", [1, 3])
def test_at_one_rate_and_the_trained_offset_the_actions_are_the_synchronous_ones(obs_steps):
    framework = tiny_models.build("helix", obs_steps=obs_steps)
    together = Policy(framework)
    seen = moments(6)
    with TwoRatePolicy(framework, system2_hz=CONTROL_HZ, wait=True) as apart:
        for now, moment in enumerate(seen):
            actions = apart.infer(moment)["actions"]
            assert np.array_equal(actions, together.infer(window(seen, now, obs_steps))["actions"])
            assert apart.staleness == min(now, obs_steps - 1)


def test_staleness_is_the_trained_offset_and_grows_by_one_until_the_next_latent():
    framework = tiny_models.build("helix", obs_steps=2)
    with TwoRatePolicy(framework, system2_hz=CONTROL_HZ / 2, wait=True) as policy:
        used = []
        for now, moment in enumerate(moments(8)):
            policy.infer(moment)
            used.append(now - policy.staleness)
    assert used == [0, 0, 0, 2, 2, 4, 4, 6]


def test_a_policy_trained_for_any_age_uses_a_latent_as_soon_as_it_is_there():
    framework = tiny_models.build("helix", obs_steps=3, offset="random")
    with TwoRatePolicy(framework, system2_hz=CONTROL_HZ, wait=True) as policy:
        for moment in moments(4):
            policy.infer(moment)
            assert policy.staleness == 0


def test_system_1_runs_at_every_step_and_system_2_at_its_rate():
    framework = tiny_models.build("helix", obs_steps=2)
    count = counted(framework)
    with TwoRatePolicy(framework, system2_hz=CONTROL_HZ / 4, wait=True) as policy:
        for moment in moments(12):
            policy.infer(moment)
    assert (count["act"], count["think"]) == (12, 3)


def test_system_1_does_not_wait_for_system_2():
    """While system 2 is held up, control goes on with the latent at hand, which ages."""
    framework = tiny_models.build("helix", obs_steps=2)
    free = threading.Event()
    free.set()
    think, threads = framework.think, set()

    def held(*args, **options):
        assert free.wait(timeout=30)
        threads.add(threading.current_thread().name)
        return think(*args, **options)

    object.__setattr__(framework, "think", held)
    with TwoRatePolicy(framework, system2_hz=CONTROL_HZ) as policy:
        seen = moments(8)
        policy.infer(seen[0])
        free.clear()
        for now in range(1, 6):
            policy.infer(seen[now])
        assert policy.staleness >= 4
        free.set()
        policy.wait = True
        policy.infer(seen[6])
        policy.infer(seen[7])
        assert policy.staleness == 1
    assert threads == {"system 2"}


def test_a_new_episode_starts_with_its_own_first_observation():
    framework = tiny_models.build("helix", obs_steps=2)
    first, second = moments(4)[:2], moments(4)[2:]
    with TwoRatePolicy(framework, system2_hz=CONTROL_HZ, wait=True) as policy:
        for moment in first:
            policy.infer(moment)
        policy.reset()
        again = policy.infer(second[0])["actions"]
    assert np.array_equal(again, Policy(framework).infer(window(second, 0, 2))["actions"])


def test_three_tiers_a_plan_in_words_at_a_rate_of_its_own():
    framework = tiny_models.build("helix", obs_steps=1, plan=True, max_plan_tokens=4)
    count = counted(framework)
    with TwoRatePolicy(framework, system2_hz=CONTROL_HZ / 2, plan_hz=CONTROL_HZ / 4, wait=True) as policy:
        for moment in moments(8):
            policy.infer(moment)
        assert isinstance(policy.plan_text, str)
    assert (count["act"], count["think"], count["plan"]) == (8, 4, 2)


def test_what_system_2_raises_reaches_control():
    framework = tiny_models.build("helix", obs_steps=1)

    def broken(*args, **options):
        raise LibrobotError("no thought")

    object.__setattr__(framework, "think", broken)
    with TwoRatePolicy(framework) as policy, pytest.raises(LibrobotError, match="no thought"):
        policy.infer(moments(1)[0])


def test_progress_comes_beside_the_actions():
    framework = tiny_models.build("helix", obs_steps=1, progress=True)
    with TwoRatePolicy(framework, wait=True) as policy:
        actions = policy.infer(moments(1)[0])["actions"]
        assert actions.shape == (tiny_models.HORIZON, tiny_models.SPEC.action_dim)
        assert policy.progress.shape == (tiny_models.HORIZON,)
        assert ((policy.progress >= 0) & (policy.progress <= 1)).all()


def test_bad_arguments():
    with pytest.raises(LibrobotError, match=r"framework=helix, found ACT"):
        TwoRatePolicy(tiny_models.build("act"))
    with pytest.raises(ValueError, match="system2_hz"):
        TwoRatePolicy(tiny_models.build("helix"), system2_hz=0)
    with TwoRatePolicy(tiny_models.build("helix")) as policy, pytest.raises(LibrobotError, match="one robot"):
        policy.infer_batch(moments(2))


def test_the_step_that_system_2_sees():
    framework = tiny_models.build("helix", obs_steps=3).eval()
    observation = framework.prepare(tiny_models.batch(obs_steps=3).observation)
    seen = one_step(observation, torch.tensor([0, 2, 1, 0]))
    assert torch.equal(seen.state[:, 0], observation.state[torch.arange(4), torch.tensor([0, 2, 1, 0])])
    assert seen.images["front"].shape[1] == 1
