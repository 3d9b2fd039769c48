"""What every option of the env= group must do. A new suite is tested here without any change."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from librobot.config.build import build_suite
from librobot.errors import LibrobotError
from librobot.sim.base import EVALUATION_SEEDS, Suite
from librobot.sim.render import GL, RAYS

CONF = Path(__file__).parents[3] / "conf" / "env"
# Of suites with many tasks, a few that cover touching, pulling and placing; and small pictures.
FEW = {"metaworld": ["reach", "drawer-open", "button-press-topdown"]}
SEED = EVALUATION_SEEDS.start + 11


def option(name, **changes):
    node = OmegaConf.load(CONF / f"{name}.yaml")
    small = {"image_size": 24, "kinds": FEW.get(name, node.get("kinds")), "max_steps": 200}
    return build_suite(OmegaConf.merge(node, {k: v for k, v in small.items() if k in node}, changes))


NAMES = sorted(path.stem for path in CONF.glob("*.yaml") if "_target_" in OmegaConf.load(path))


@pytest.fixture(scope="module", params=NAMES)
def suite(request):
    return option(request.param)


@pytest.fixture(scope="module")
def env(suite):
    made = suite.make()
    yield made
    made.close()


def same(a, b):
    return (
        a["prompt"] == b["prompt"]
        and (a["state"] == b["state"]).all()
        and all((a["images"][camera] == b["images"][camera]).all() for camera in a["images"])
    )


def test_it_is_a_suite_described_in_plain_types(suite):
    assert isinstance(suite, Suite)
    described = json.loads(json.dumps(suite.to_dict()))
    assert described["name"] == suite.name
    assert described["kinds"] == list(suite.kinds)
    assert suite.renderer in (GL, RAYS)
    assert suite.noise_scale.shape == (suite.spec.action_dim,)
    assert (suite.noise_scale >= 0).all()


def test_its_description_holds_its_options(suite):
    """So that an evaluation can build the suite that a checkpoint was trained in."""
    node = OmegaConf.load(CONF / f"{suite.name}.yaml")
    described = {key: value for key, value in suite.to_dict().items() if key in node and key != "renderer"}
    again = build_suite(OmegaConf.merge(node, described))
    assert again.to_dict() == suite.to_dict()
    assert again.spec == suite.spec


def test_it_survives_pickling(suite):
    copy = pickle.loads(pickle.dumps(suite))
    assert copy.to_dict() == suite.to_dict()
    assert copy.spec == suite.spec


def test_spaces_are_those_of_the_robot(suite, env):
    spec, space = suite.spec, env.observation_space
    assert tuple(space["images"].spaces) == spec.camera_names
    for camera in spec.cameras:
        assert space["images"][camera.name].shape == (camera.height, camera.width, 3)
        assert space["images"][camera.name].dtype == np.uint8
    assert space["state"].shape == (spec.state_dim,)
    assert env.action_space.shape == (spec.action_dim,)


def test_observations_are_in_their_spaces(suite, env):
    for number, kind in enumerate(suite.kinds):
        observation, info = env.reset(seed=SEED + number, options={"kind": kind})
        assert env.observation_space.contains(observation)
        assert info == {"kind": kind, "success": False}
        expert = suite.expert(env)
        expert.reset()
        action = expert(observation)
        assert action.shape == env.action_space.shape
        observation, reward, terminated, truncated, info = env.step(action)
        assert env.observation_space.contains(observation)
        assert (info["kind"], terminated, truncated) == (kind, False, False)
        assert isinstance(reward, float)


def test_a_seed_is_a_scene(suite, env):
    kind = suite.kinds[-1]
    first, _ = env.reset(seed=SEED, options={"kind": kind})
    other, _ = env.reset(seed=SEED + 1, options={"kind": kind})
    assert not same(first, other)
    assert any((first["images"][c] != other["images"][c]).any() for c in first["images"])
    for _ in range(3):  # what happened in another episode leaves no trace
        env.step(np.zeros(env.action_space.shape, np.float32))
    env.reset(seed=SEED + 2, options={"kind": suite.kinds[0]})
    again, _ = env.reset(seed=SEED, options={"kind": kind})
    assert same(first, again)
    fresh = suite.make()
    elsewhere, _ = fresh.reset(seed=SEED, options={"kind": kind})
    fresh.close()
    assert same(first, elsewhere)


def test_instructions_tell_kinds_apart(suite, env):
    prompts = {}
    for kind in suite.kinds:
        seen = [env.reset(seed=SEED + i, options={"kind": kind})[0]["prompt"] for i in range(4)]
        assert all(prompt.strip() for prompt in seen)
        prompts[kind] = set(seen)
    for kind, words in prompts.items():
        for other, theirs in prompts.items():
            assert kind == other or not words & theirs


def test_experts_succeed_and_success_ends_the_episode(suite, env):
    for kind in suite.kinds:
        observation, _ = env.reset(seed=SEED, options={"kind": kind})
        expert = suite.expert(env)
        expert.reset()
        terminated = truncated = False
        while not (terminated or truncated):
            assert observation["prompt"]
            observation, _, terminated, truncated, info = env.step(expert(observation))
            assert terminated == info["success"]
        assert (terminated, truncated) == (True, False), kind


def test_doing_nothing_is_cut_short_without_success(suite, env):
    env.reset(seed=SEED, options={"kind": suite.kinds[0]})
    for _ in range(2000):
        _, _, terminated, truncated, info = env.step(np.zeros(env.action_space.shape, np.float32))
        assert not terminated
        assert not info["success"]
        if truncated:
            break
    assert truncated


def test_render_gives_a_larger_picture(suite, env):
    env.reset(seed=SEED, options={"kind": suite.kinds[0]})
    picture = env.render()
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    assert all(picture.shape[0] > camera.height for camera in suite.spec.cameras)
    assert picture.std() > 5


def test_unknown_kinds_are_refused_with_the_nearest(suite, env):
    kind = suite.kinds[0]
    with pytest.raises(LibrobotError, match=f"'{kind}'"):
        env.reset(seed=SEED, options={"kind": kind + "x"})
    with pytest.raises(LibrobotError, match=f"'{kind}'"):
        option(suite.name, kinds=[kind + "x"])


@pytest.mark.parametrize("name", NAMES)
def test_it_draws_without_opengl(name):
    suite = option(name, renderer="rays")
    assert suite.renderer == RAYS
    env = suite.make()
    observation, _ = env.reset(seed=SEED, options={"kind": suite.kinds[0]})
    assert all(image.std() > 5 for image in observation["images"].values())
    env.close()
