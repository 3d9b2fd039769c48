"""A simulation of the robot that the small dataset is of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from fake_suite import FakeSuite, PointEnv
from small_runs import SPEC


class StickEnv(PointEnv):
    def observation(self):
        point = super().observation()
        picture = np.kron(point["images"]["top"], np.ones((2, 2, 1), np.uint8))
        return {**point, "images": {"front": picture}}

    def render(self):
        return self.observation()["images"]["front"]


@dataclass
class StickSuite(FakeSuite):
    name: str = "stick"
    limit: int = 40

    @property
    def spec(self):
        return SPEC

    def make(self):
        return StickEnv(self)
