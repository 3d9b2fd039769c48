"""A policy for two robots, for callbacks that tell them apart."""

from types import SimpleNamespace

import torch

from librobot.frameworks.base import Framework


class TwoRobots(Framework):
    """Only what a callback asks of a policy: an arm with one dimension, a hand with two."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        arm, hand = (
            SimpleNamespace(name=name, action=[SimpleNamespace(name=dim) for dim in dims])
            for name, dims in (("arm", ["lift"]), ("hand", ["open", "turn"]))
        )
        self.robots = SimpleNamespace(specs=(arm, hand), ids=lambda ids: ids)
        self.spec, self.head = SimpleNamespace(action_dim=2), torch.nn.Identity()
        self.logged = {}

    def log(self, name, value, sync_dist=False):
        self.logged[name] = float(value)
