"""The object graph of a run, assembled from its configuration: only here are config nodes instantiated."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from librobot.config.check import locate
from librobot.config.schema import PARTS
from librobot.errors import LibrobotError, require
from librobot.types import RobotSpec

if TYPE_CHECKING:
    from lightning import Trainer

    from librobot.data.datamodule import DataModule
    from librobot.data.sources.base import Source
    from librobot.frameworks.base import Framework
    from librobot.representation import ActionRepresentation, Representation
    from librobot.sim.base import Suite


OF_A_DATASET = (
    "source",
    "cameras",
    "image_size",
    "cache",
    "cache_build",
    "cache_limit_gb",
    "on_error",
    "stride",
    "stride_rotation",
)
"""What a mixture takes of a dataset's node."""


def build(node: DictConfig | Mapping[str, Any], place: str, **given: Any) -> Any:
    """What the node's `_target_` makes of the node's arguments and `given`; a partial for a `_partial_` node.

    `given` is handed over untouched: OmegaConf would copy modules and turn dataclasses into dictionaries.
    Bad values (the target's ValueError or TypeError) become a LibrobotError that starts with `place`.
    """
    try:
        if node.get("_partial_"):
            return instantiate(node, _convert_="all")
        factory = instantiate(node, _convert_="all", _partial_=True)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, LibrobotError):
            raise cause from None
        if cause is None or isinstance(cause, ValueError | TypeError):
            raise LibrobotError(f"{place}: {cause or error}") from error
        raise cause from None
    try:
        return factory(**given)
    except (ValueError, TypeError) as error:
        name = str(node.get("_target_", "")).rpartition(".")[2]
        raise LibrobotError(f"{place} ({name}): {error}") from error


def plain(node: DictConfig) -> dict[str, Any]:
    """A copy of `node` in plain types, interpolations resolved."""
    copy = OmegaConf.to_container(node, resolve=True)
    assert isinstance(copy, dict)
    return {str(key): value for key, value in copy.items()}


def build_datamodule(cfg: DictConfig) -> DataModule:
    """The data of a run. `data.root` is there for the source to read, not for the DataModule itself.

    The datasets of a mixture are nodes of the `data=` group too, of which it wants the source and how to
    open it.
    """
    node = plain(cfg.data)
    node.pop("root", None)
    datasets = (node.get("source") or {}).get("datasets") or {}
    for name, dataset in datasets.items():
        datasets[name] = {key: dataset[key] for key in OF_A_DATASET if key in dataset}
    steps = {
        name: build(step, f"augmentation.{name}")
        for name, step in (cfg.get("augmentation") or {}).items()
        if step
    }
    return build(OmegaConf.create(node), "data", **({"augmentations": steps} if steps else {}))


def open_source(root: str, format: str | None, options: Sequence[str]) -> Source:
    """The dataset at `root`, by an option of the `data=` group (None: what its files look like) and KEY=VALUE
    of its source."""
    from librobot.config.compose import compose
    from librobot.data.detect import detect

    chosen = [f"data={format or detect(root)}", f"data.root={root}"]
    return build_datamodule(compose([*chosen, *(f"data.source.{option}" for option in options)])).source


def robots_of(source: Source) -> Sequence[RobotSpec] | None:
    """The robots of a mixture of several; None for one robot."""
    robots = getattr(source, "embodiments", ())
    return robots if len(robots) > 1 else None


def build_suite(env: DictConfig) -> Suite:
    """The simulated tasks of an `env=` node."""
    return build(env, "env")


def build_spec(cfg: DictConfig, source: Source) -> RobotSpec:
    """The robot that the policy is for: the named one, or what the dataset says of its own.

    A named robot must be the one that the dataset was recorded with: its cameras, state and action, by name;
    another control rate warns. Image sizes are the dataset's, because `data.image_size` may have changed
    them.
    """
    theirs = source.spec
    if not cfg.robot:
        return theirs
    spec: RobotSpec = build(cfg.robot, "robot")
    problems = [
        f"{kind} is [{', '.join(found)}] in the dataset, [{', '.join(expected)}] in the robot"
        for kind, expected, found in (
            ("cameras", sorted(spec.camera_names), sorted(theirs.camera_names)),
            ("state", [dim.name for dim in spec.state], [dim.name for dim in theirs.state]),
            ("action", [dim.name for dim in spec.action], [dim.name for dim in theirs.action]),
        )
        if expected != found
    ]
    if problems:
        raise LibrobotError(
            f"{source.provenance.get('root', 'the dataset')} does not fit robot {spec.name!r}: "
            f"{'; '.join(problems)}. Choose its cameras with data.cameras=[...], name the robot that "
            f"recorded it, or take robot=from_data, which reads the robot from the dataset"
        )
    if not math.isclose(spec.control_hz, theirs.control_hz):
        factor = spec.control_hz / theirs.control_hz
        recorded = source.provenance.get("recorded_hz")
        rate = f"was recorded at {theirs.control_hz:g} Hz"
        if recorded is not None:
            rate = f"has {theirs.control_hz:g} strides of {source.provenance['stride']} frames a second"
        warnings.warn(
            f"robot {spec.name!r} acts at {spec.control_hz:g} Hz, the dataset {rate}: "
            f"motions will be {factor:.2g} times as fast as the demonstrations'; "
            f"set robot.control_hz={theirs.control_hz:g}",
            stacklevel=2,
        )
    sizes = {camera.name: camera for camera in theirs.cameras}
    return replace(spec, cameras=tuple(sizes[name] for name in spec.camera_names))


def build_framework(
    cfg: DictConfig, spec: RobotSpec, embodiments: Sequence[RobotSpec] | None = None
) -> Framework:
    """The policy: a framework over a backbone (with its adapter) and an action head, for one robot, or for
    several `embodiments` of which `spec` is the union. It sees their actions as `actions=` says."""
    from librobot.nn.pretrained import weights_follow
    from librobot.policy import Policy

    seen = build_representation(cfg, spec, embodiments)
    if seen is not None:
        spec, embodiments = seen.spec, seen.embodiments
    vlm = build(cfg.vlm, "vlm")
    if cfg.get("adapter"):
        build(cfg.adapter, "adapter", vlm=vlm)
    more: dict[str, Any] = {} if embodiments is None else {"embodiments": embodiments}
    if cfg.framework.get("acting_crop") == "auto" and cfg.framework.get("crop") is None:
        more["acting_crop"] = augmented_share(cfg)
    framework = build(
        cfg.framework,
        "framework",
        spec=spec,
        vlm=vlm,
        head=build(cfg.head, "head"),
        optimizer=build(cfg.optim, "optim"),
        scheduler=build(cfg.scheduler, "scheduler"),
        **build_parts(cfg),
        **more,
    )
    framework.robots.representation = seen
    if cfg.head.get("teacher") and not weights_follow():
        framework.learn_from(Policy.from_checkpoint(cfg.head.teacher, device="cpu").framework)
    return framework


def augmented_share(cfg: DictConfig) -> float | None:
    """The share of a picture's area that `augmentation=random_crop` cuts out on average; None where training
    also sees whole pictures."""
    node = (cfg.get("augmentation") or {}).get("random_crop")
    if not node or node.get("cameras") is not None or node.get("probability", 1.0) < 1.0:
        return None
    low, high = node.get("scale", (0.9, 1.0))
    return None if high >= 1.0 else (low + high) / 2


def build_representation(
    cfg: DictConfig, spec: RobotSpec, embodiments: Sequence[RobotSpec] | None
) -> Representation | None:
    """How the policy sees the robots' actions; None where it sees them as they are."""
    if not cfg.get("actions"):
        return None
    chosen: ActionRepresentation = build(cfg.actions, "actions")
    try:
        seen = chosen.bind(spec, embodiments)
    except ValueError as error:
        raise LibrobotError(f"actions.{error}") from error
    return seen if seen.changes else None


def build_parts(cfg: DictConfig) -> dict[str, Any]:
    """The optional parts that a configuration names, for a framework that is put together from them."""
    named = [part for part in PARTS if cfg.get(part)]
    target = locate(cfg.framework._target_, "framework")
    taken = inspect.signature(target).parameters
    for part in named:
        if part not in taken:
            raise LibrobotError(
                f"{part}: {target.__name__} has its own and takes none; leave {part}= out, or take "
                f"framework=custom"
            )
    return {part: build(cfg[part], part) for part in named}


def build_trainer(cfg: DictConfig) -> Trainer:
    """Lightning's trainer with the callbacks, loggers and plugins of the run."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from librobot.training.checkpoints import AtomicCheckpointIO

    node = plain(cfg.trainer)
    if "deepspeed" in str(node.get("strategy")).lower():
        require("deepspeed", "deepspeed")
    plugins = [build(item, f"trainer.plugins[{i}]") for i, item in enumerate(node.pop("plugins", None) or [])]
    callbacks = [build(item, f"callbacks.{name}") for name, item in cfg.callbacks.items() if item]
    loggers = [build(item, f"logger.{name}") for name, item in cfg.logger.items() if item]
    try:
        return build(
            node,
            "trainer",
            callbacks=callbacks,
            logger=loggers or False,
            plugins=[*plugins, AtomicCheckpointIO()],
            default_root_dir=cfg.run_dir,
        )
    except MisconfigurationException as error:
        raise LibrobotError(f"trainer: {error}") from error
