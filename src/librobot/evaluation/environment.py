"""Which suite a policy is evaluated in: the named one, or the one that its demonstrations came from."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Protocol

from omegaconf import DictConfig, OmegaConf

from librobot.errors import LibrobotError
from librobot.sim.render import RAYS

log = logging.getLogger(__name__)


class Described(Protocol):
    """A policy that knows its origin (`librobot.policy.Policy`)."""

    config: dict[str, Any]
    provenance: dict[str, Any]


def suite_node(env: DictConfig, policy: Described | None) -> DictConfig:
    """The `env=` node to build: `env` itself where it names a suite, else the checkpoint's own.

    `policy` is None for the expert. Options in an `env` without `_target_` replace the checkpoint's.
    Raises LibrobotError where the suite of the demonstrations is unknown.
    """
    if "_target_" in env:
        return env
    if policy is None:
        raise LibrobotError("env: name the suite that the expert is to solve, such as env=tabletop")
    return DictConfig(OmegaConf.merge(trained_in(policy.provenance, policy.config), env))


def trained_in(provenance: dict[str, Any], config: dict[str, Any]) -> DictConfig:
    """The node of the suite that recorded the training data, with the options that it was recorded with.

    A description's keys are the options of its suite's node, beside `name` and `renderer` (the back end
    that drew the pictures).
    """
    described = provenance.get("env")
    if not described:
        raise LibrobotError(
            "env: the checkpoint's dataset does not say which simulation it is from; name the suite to "
            "evaluate in, such as env=tabletop"
        )
    node = _node_of(described["name"], config)
    options = {key: value for key, value in described.items() if key in node and key != "renderer"}
    drawn_by = provenance.get("renderer") or described.get("renderer")
    if "renderer" in node and drawn_by == RAYS:
        options["renderer"] = "rays"
    return DictConfig(OmegaConf.merge(node, options))


def _node_of(name: str, config: dict[str, Any]) -> DictConfig:
    """conf/env/NAME.yaml, or the training configuration's own node for a suite of another package."""
    packaged = files("librobot.conf").joinpath("env", f"{name}.yaml")
    if packaged.is_file():
        return DictConfig(OmegaConf.create(packaged.read_text(encoding="utf-8")))
    node = config.get("env") or {}
    if "_target_" not in node:
        raise LibrobotError(
            f"env: the demonstrations are of the suite {name!r}, which is not known here; name it: env=..."
        )
    return OmegaConf.create(node)


def warn_of_renderer(trained: str | None, here: str) -> None:
    """Warn where pictures are drawn by another back end than in training: they look different."""
    if trained and trained != here:
        log.warning(
            "the policy was trained on pictures drawn by %s, the suite draws by %s here: success may be far "
            "lower; install what %s needs, or train on demonstrations recorded on this machine",
            trained, here, trained,
        )  # fmt: skip


def warn_of_rate(trained: float, here: float, provenance: Mapping[str, Any]) -> None:
    """Warn where a step of the suite takes another time than one of training did: `trained` and `here` are
    rates in 1/s, and `provenance` says whether the policy learnt strides of frames."""
    if math.isclose(trained, here, rel_tol=0.01):
        return
    stride = provenance.get("stride")
    frames = f" (data.stride={stride} of {provenance['recorded_hz']:g} Hz)" if stride else ""
    log.warning(
        "the policy learnt to act at %g Hz%s and the suite takes an action at each of its %g steps a second: "
        "motions are %.2g times as fast as those demonstrated, and success may be far lower; evaluate at "
        "%g Hz, or train at %g Hz",
        trained, frames, here, here / trained, trained, here,
    )  # fmt: skip
