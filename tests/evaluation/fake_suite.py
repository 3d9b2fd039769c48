"""A point that moves on a plane: a real environment, small enough to test the loop around it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import gymnasium
import numpy as np

from librobot.types import Camera, Dim, RobotSpec

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 230)}


class PointEnv(gymnasium.Env):
    """Move the point onto the goal that the instruction names. Both are drawn into an 16x16 image."""

    def __init__(self, suite: FakeSuite) -> None:
        self.suite = suite
        box = gymnasium.spaces.Box
        self.action_space = box(-1, 1, (2,), np.float32)
        self.observation_space = gymnasium.spaces.Dict(
            images=gymnasium.spaces.Dict(top=box(0, 255, (16, 16, 3), np.uint8)),
            state=box(-2, 2, (2,), np.float32),
            prompt=gymnasium.spaces.Text(80),
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.kind = options["kind"]
        if self.suite.fail == "reset":
            raise RuntimeError("the scene is broken")
        self.colour = str(self.np_random.choice(list(COLOURS)))
        self.point = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        self.goal = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        self.steps = 0
        return self.observation(), {"kind": self.kind, "success": False}

    def step(self, action):
        self.steps += 1
        if self.suite.fail == "step" and self.steps == 3:
            raise ValueError("the simulation diverged")
        if self.suite.fail == "exit" and self.steps == 3:
            os._exit(7)
        if self.suite.fail == "hang":
            time.sleep(60)
        self.point = np.clip(self.point + 0.2 * np.clip(action, -1, 1), -2, 2).astype(np.float32)
        success = bool(np.linalg.norm(self.point - self.goal) < 0.15)
        truncated = not success and self.steps >= self.suite.limit
        return self.observation(), 0.0, success, truncated, {"kind": self.kind, "success": success}

    def observation(self):
        image = np.zeros((16, 16, 3), np.uint8)
        for place, colour in ((self.goal, COLOURS[self.colour]), (self.point, (255, 255, 255))):
            column, row = np.clip((place + 1) * 8, 0, 15).astype(int)
            image[row, column] = colour
        prompt = f"{self.kind} to the {self.colour} goal"
        return {"images": {"top": image}, "state": np.concatenate([self.point]), "prompt": prompt}

    def render(self):
        return np.kron(self.observation()["images"]["top"], np.ones((12, 12, 1), np.uint8))


class PointExpert:
    def __init__(self, env: PointEnv) -> None:
        self.env = env

    def reset(self) -> None:
        pass

    def __call__(self, observation):
        return np.clip(5 * (self.env.goal - self.env.point), -1, 1).astype(np.float32)


@dataclass
class FakeSuite:
    limit: int = 30
    fail: str = ""
    name: str = "point"
    kinds: tuple[str, ...] = ("walk", "run")
    renderer: str = "none"

    @property
    def spec(self) -> RobotSpec:
        dims = (Dim("x", "m"), Dim("y", "m"))
        return RobotSpec("point", (Camera("top", 16, 16),), dims, dims, 10.0)

    def make(self) -> PointEnv:
        return PointEnv(self)

    def expert(self, env: PointEnv) -> PointExpert:
        return PointExpert(env)

    def to_dict(self) -> dict:
        return {"name": self.name, "limit": self.limit}


class FakePolicy:
    """Goes to the brightest coloured pixel: it needs the picture. With `words`, only where the
    instruction names the pixel's colour: it needs that too."""

    def __init__(self, *, horizon: int = 6, words: bool = False, obs_steps: int = 1) -> None:
        self.spec, self.horizon, self.words, self.obs_steps = FakeSuite().spec, horizon, words, obs_steps
        self.batches: list[int] = []

    def infer(self, observation):
        image, state = observation["images"]["top"], observation["state"]
        if self.obs_steps > 1:
            assert image.shape == (self.obs_steps, 16, 16, 3)
            assert state.shape == (self.obs_steps, 2)
            image, state = image[-1], state[-1]
        actions = np.zeros((self.horizon, 2), np.float32)
        for colour, value in COLOURS.items():
            rows, columns = np.nonzero((image == value).all(-1))
            if len(rows) and (colour in observation["prompt"] or not self.words):
                place = state.copy()
                goal = (np.array([columns[0], rows[0]]) + 0.5) / 8 - 1
                for action in actions:
                    action[:] = np.clip(5 * (goal - place), -1, 1)
                    place += 0.2 * action
        return {"actions": actions}

    def infer_batch(self, observations):
        self.batches.append(len(observations))
        return [self.infer(observation) for observation in observations]
