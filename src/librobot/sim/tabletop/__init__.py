"""The embedded suite: a table of coloured things, a five-joint arm, and five kinds of instruction."""

from librobot.sim.tabletop.suite import TabletopSuite

__all__ = ["TabletopSuite"]
