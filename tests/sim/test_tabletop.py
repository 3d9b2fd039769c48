"""The embedded suite: layouts, tasks, success, experts."""

import numpy as np
import pytest

from librobot.errors import LibrobotError
from librobot.sim.tabletop import TabletopSuite
from librobot.sim.tabletop.env import STEP_LIMITS, TabletopEnv
from librobot.sim.tabletop.layout import AREA, KINDS, SPACING, draw_layout
from librobot.sim.tabletop.scene import COLOURS


def play(
    suite: TabletopSuite, env: TabletopEnv, kind: str, seed: int, noise: float = 0.0
) -> tuple[bool, int]:
    expert, generator = suite.expert(env), np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed, options={"kind": kind})
    expert.reset()
    steps, done, info = 0, False, {}
    while not done:
        action = expert(observation)
        action = action + noise * suite.noise_scale * generator.standard_normal(len(action))
        observation, _, terminated, truncated, info = env.step(action)
        steps, done = steps + 1, terminated or truncated
    return info["success"], steps


@pytest.mark.parametrize("action", ["ee", "joint"])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_experts_succeed(action, noise) -> None:
    suite = TabletopSuite(action=action, image_size=16, renderer="rays")
    env = suite.make()
    episodes = [(kind, seed) for kind in KINDS for seed in range(8)]
    won = [(kind, seed) for kind, seed in episodes if play(suite, env, kind, seed, noise)[0]]
    assert len(won) >= len(episodes) - 2, sorted(set(episodes) - set(won))


def test_every_kind_asks_for_colours_or_directions() -> None:
    generator = np.random.default_rng(0)
    for kind in KINDS:
        prompts = {draw_layout(kind, generator).task.prompt for _ in range(200)}
        assert len(prompts) == {"drawer": 2, "push": 9, "put": 9}.get(kind, 3)
    assert len(COLOURS) >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_fill_the_working_area(kind) -> None:
    assert (AREA[1] - AREA[0] >= 0.20).all()
    layouts = [draw_layout(kind, np.random.default_rng(seed)) for seed in range(150)]
    subjects = np.array([place for one in layouts for name, place in one.places.items() if name != "drawer"])
    low, high = subjects.min(axis=0), subjects.max(axis=0)
    assert (high - low > 0.9 * (AREA[1] - AREA[0])).all()
    assert (subjects >= AREA[0]).all()
    assert (subjects <= AREA[1]).all()
    turns = [turn for one in layouts for turn in one.yaws.values()]
    assert np.std(turns) > 0.3
    for one in layouts:
        places = [place for name, place in one.places.items() if name != "drawer"]
        gaps = [np.linalg.norm(a - b) for i, a in enumerate(places) for b in places[:i]]
        assert not gaps or min(gaps) >= SPACING


def test_the_seed_decides_the_scene() -> None:
    env = TabletopSuite(image_size=32, renderer="rays").make()
    first = env.reset(seed=7, options={"kind": "put"})[0]
    other = env.reset(seed=8, options={"kind": "put"})[0]
    again = env.reset(seed=7, options={"kind": "put"})[0]
    assert (first["images"]["front"] == again["images"]["front"]).all()
    assert (first["state"] == again["state"]).all()
    assert (first["images"]["front"] != other["images"]["front"]).any()


def test_a_still_arm_never_succeeds_and_is_cut_off() -> None:
    env = TabletopSuite(image_size=16, renderer="rays").make()
    for kind in KINDS:
        observation, _ = env.reset(seed=3, options={"kind": kind})
        stay = np.array([*observation["state"][6:10], 0.5])
        for step in range(STEP_LIMITS[kind]):
            *_, terminated, truncated, info = env.step(stay)
            assert not terminated
            assert truncated == (step + 1 == STEP_LIMITS[kind])
        assert not info["success"]


def test_doing_another_task_does_not_count() -> None:
    """An expert that handles another colour than the one asked for fails."""
    suite = TabletopSuite(image_size=16, renderer="rays")
    env = suite.make()
    wins = 0
    for seed in range(6):
        expert = suite.expert(env)
        observation, _ = env.reset(seed=seed, options={"kind": "press"})
        expert.reset()
        asked = env.task.subject
        other = next(colour for colour in COLOURS if colour != asked)
        expert._press = lambda other=other, expert=expert: (  # type: ignore[attr-defined]
            expert._above(env.position(f"button_{other}")[:2], 0.02), 0.0, 0.0,
        )  # fmt: skip
        expert._goals["press"] = expert._press
        done, info = False, {}
        while not done:
            observation, _, terminated, truncated, info = env.step(expert(observation))
            done = terminated or truncated
        wins += info["success"]
    assert wins == 0


def test_actions_are_limited_in_speed() -> None:
    env = TabletopSuite(image_size=16, renderer="rays").make()
    env.reset(seed=0, options={"kind": "reach"})
    before = env.pose.position
    env.step(np.array([0.38, 0.15, 0.02, 1.0, 1.0]))
    assert np.linalg.norm(env.pose.position - before) < 0.06


@pytest.mark.parametrize("bad", [np.zeros(4), np.full(5, np.nan)])
def test_bad_actions_are_refused(bad) -> None:
    env = TabletopSuite(image_size=16, renderer="rays").make()
    env.reset(seed=0)
    with pytest.raises(LibrobotError, match="5 finite numbers"):
        env.step(bad)


def test_bad_options() -> None:
    with pytest.raises(LibrobotError, match="did you mean 'push'"):
        TabletopSuite(kinds=("puhs",))  # type: ignore[arg-type]
    with pytest.raises(LibrobotError, match=r"env\.action"):
        TabletopSuite(action="velocity")  # type: ignore[arg-type]
    env = TabletopSuite(image_size=16, renderer="rays", kinds=("reach", "press")).make()
    with pytest.raises(LibrobotError, match="unknown kind"):
        env.reset(seed=0, options={"kind": "put"})
