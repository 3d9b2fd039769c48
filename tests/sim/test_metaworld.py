import numpy as np
import pytest

from librobot.errors import LibrobotError
from librobot.sim import metaworld
from librobot.sim.metaworld import KEPT_TASKS, MetaWorldSuite
from librobot.sim.metaworld_tasks import SENTENCES


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(
        metaworld._Scene, "picture", lambda self, camera, size: np.zeros((size, size, 3), np.uint8)
    )


def run_expert(suite, env, kind, seed):
    observation, _ = env.reset(seed=seed, options={"kind": kind})
    expert = suite.expert(env)
    expert.reset()
    for step in range(1, 1000):
        observation, _, terminated, truncated, _ = env.step(expert(observation))
        if terminated or truncated:
            return terminated, step
    raise AssertionError("the episode does not end")


def test_there_is_a_sentence_for_each_of_the_50_tasks():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.policies import ENV_POLICY_MAP

    assert {f"{kind}-v3" for kind in SENTENCES} == set(ALL_V3_ENVIRONMENTS) == set(ENV_POLICY_MAP)
    assert len(set(SENTENCES.values())) == 50
    assert MetaWorldSuite().kinds == tuple(SENTENCES)


def test_state_holds_the_hand_and_no_object(no_pictures):
    suite = MetaWorldSuite(kinds=["push"], image_size=8)
    env = suite.make()
    first, _ = env.reset(seed=1, options={"kind": "push"})
    second, _ = env.reset(seed=2, options={"kind": "push"})
    np.testing.assert_array_equal(first["state"], second["state"])  # other object, same hand
    np.testing.assert_allclose(first["state"][:3], env.scene.env.get_endeff_pos(), atol=1e-6)
    opened, closed = (env.step(np.array([0, 0, 0, g], np.float32))[0]["state"][3] for g in (-1, 1))
    for _ in range(10):
        closed = env.step(np.array([0, 0, 0, 1], np.float32))[0]["state"][3]
    assert 0 <= closed < opened <= 1


def test_an_action_of_one_moves_the_hand_by_a_centimetre_a_step(no_pictures):
    env = MetaWorldSuite(kinds=["reach"], image_size=8).make()
    observation, _ = env.reset(seed=1, options={"kind": "reach"})
    start = observation["state"][0]
    for _ in range(20):
        observation, *_ = env.step(np.array([-1, 0, 0, 0], np.float32))
    assert (start - observation["state"][0]) == pytest.approx(0.2, abs=0.06)  # the arm lags a little


def test_step_limit_is_the_suites_own(no_pictures):
    env = MetaWorldSuite(kinds=["push"], image_size=8, max_steps=7).make()
    env.reset(seed=1, options={"kind": "push"})
    ends = [env.step(np.zeros(4, np.float32))[2:4] for _ in range(7)]
    assert ends == [(False, False)] * 6 + [(False, True)]


def test_compiled_scenes_are_kept_up_to_a_number(no_pictures):
    kinds = ["reach", "push", "drawer-open", "door-close", "window-open"]
    assert len(kinds) > KEPT_TASKS
    env = MetaWorldSuite(kinds=kinds, image_size=8).make()
    for kind in kinds:
        env.reset(seed=0, options={"kind": kind})
    assert list(env._scenes) == kinds[-KEPT_TASKS:]


def test_fixed_pictures_are_upright():
    """The corner camera hangs upside down in Meta-World's scene: turned, the table is in the lower half."""
    suite = MetaWorldSuite(kinds=["reach"], image_size=32, cameras={"front": "corner"}, renderer="rays")
    env = suite.make()
    observation, _ = env.reset(seed=0, options={"kind": "reach"})
    raw = env.scene.drawn.render(env.scene.env.data, "corner", 32, 32)
    np.testing.assert_array_equal(observation["images"]["front"], raw[::-1, ::-1])
    env.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size"),
        ({"max_steps": 501}, "between 1 and 500"),
        ({"kinds": []}, "at least one"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MetaWorldSuite(**options)


def test_an_unknown_camera_is_refused():
    env = MetaWorldSuite(kinds=["reach"], image_size=8, cameras={"front": "cornr"}).make()
    with pytest.raises(LibrobotError, match="corner"):
        env.reset(seed=0, options={"kind": "reach"})


@pytest.mark.slow
def test_all_50_experts_succeed_through_the_seam(no_pictures):
    suite = MetaWorldSuite(image_size=8)
    env = suite.make()
    outcomes = {
        (kind, seed): run_expert(suite, env, kind, seed)[0] for kind in suite.kinds for seed in (5, 1_000_000)
    }
    failed = [key for key, success in outcomes.items() if not success]
    assert np.mean(list(outcomes.values())) >= 0.9, failed
