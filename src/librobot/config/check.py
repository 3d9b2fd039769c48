"""The arguments of every `_target_` in a configuration, held against its signature before it is built."""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from librobot.config.explain import ConfigError, explain
from librobot.config.schema import PARTS, TrainConfig, check_root
from librobot.errors import LibrobotError, nearest

# What librobot.config.build passes itself: a YAML neither has to name these nor may.
GIVEN = {
    "data": ("augmentations",),
    "framework": ("spec", "vlm", "head", "optimizer", "scheduler", *PARTS),
    "adapter": ("vlm",),
    "optim": ("params",),
    "scheduler": ("optimizer", "total_steps"),
    "trainer": ("callbacks", "logger", "default_root_dir"),
}
# Keys of a group that its own nodes read by interpolation; they are no arguments of its target.
READ_BY_OTHERS = {"data": ("root",)}
DATASETS = "data.source.datasets."  # the nodes below it, of a mixture, are of the group data too

SPECIAL = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
SIMPLE = (int, float, str, bool, type(None))


def check(cfg: DictConfig, schema: type = TrainConfig) -> None:
    """Check the whole configuration; raise one LibrobotError that lists everything wrong with it.

    Imports the targets' modules (torch with them), builds nothing.
    """
    check_root(cfg, schema)
    needed = missing(OmegaConf.to_container(cfg, resolve=False))
    problems = [f"{key}: a value is needed here; give {key}=VALUE" for key in needed]
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    except ConfigError as error:
        if problems:
            raise LibrobotError("\n".join(problems)) from error
        raise LibrobotError(explain(error, (), "")) from error
    for path, node in targets(plain):
        problems += _problems(path, node)
    if problems:
        raise LibrobotError("\n".join(problems))


def missing(node: Any, path: str = "") -> Iterator[str]:
    """The config path of every `???`, the values that only a user can know."""
    if node == "???":
        yield path
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from missing(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from missing(value, f"{path}[{index}]")


def targets(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node with a `_target_`, with its config path."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from targets(value, f"{path}[{index}]")


def locate(name: str, path: str) -> Callable[..., Any]:
    """The class or function called `name`; LibrobotError names the config path of what cannot be imported."""
    try:
        found = get_object(name)
    except (ImportError, ValueError, AttributeError) as error:
        module, _, attribute = name.rpartition(".")
        try:
            names = [key for key in vars(importlib.import_module(module)) if not key.startswith("_")]
        except Exception:
            raise LibrobotError(f"{path}._target_: cannot import {name!r}: {error}") from error
        raise LibrobotError(
            f"{path}._target_: the module {module} has no {attribute!r}; {nearest(attribute, names)}"
        ) from error
    if not callable(found):
        raise LibrobotError(
            f"{path}._target_: expected a class or a function, found {name!r}, which is neither"
        )
    return found


def _problems(path: str, node: dict[str, Any]) -> list[str]:
    """What is wrong with one node."""
    try:
        target = locate(node["_target_"], path)
        parameters = inspect.signature(target).parameters
    except LibrobotError as error:
        return [str(error)]
    except (TypeError, ValueError):
        return []  # a builtin without a signature
    given = GIVEN.get(path, ())
    positional = [
        p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    filled = set(positional[: len(node.get("_args_", []))]) | set(given)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    group = "data" if path.startswith(DATASETS) and "." not in path.removeprefix(DATASETS) else path
    skipped = (*SPECIAL, *READ_BY_OTHERS.get(group, ()))
    arguments = {key: value for key, value in node.items() if key not in skipped}
    hints = _hints(target)
    problems = []
    for key, value in arguments.items():
        if key in given:
            problems.append(
                f"{path}.{key}: this argument of {_name(target)} is filled in by librobot; remove it"
            )
        elif key not in named and not open_ended:
            options = [name for name in named if name not in given]
            problems.append(f"{path}.{key}: {_name(target)} has no argument {key!r}; {nearest(key, options)}")
        elif key in hints and value != "???" and not _fits(value, hints[key]):
            problems.append(f"{path}.{key}: expected {_words(hints[key])}, found {value!r}")
    if not node.get("_partial_"):
        for name in named:
            if (
                parameters[name].default is inspect.Parameter.empty
                and name not in filled
                and name not in arguments
            ):
                problems.append(
                    f"{path}.{name}: {_name(target)} needs this argument; give +{path}.{name}=VALUE"
                )
    return problems


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Annotations as types; none where they only exist for type checkers."""
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # names under TYPE_CHECKING, shapes of jaxtyping
        return {}


def _parts(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value can be what `hint` asks; only simple types and literals are judged."""
    parts = _parts(hint)
    if not all(part in SIMPLE or typing.get_origin(part) is typing.Literal for part in parts):
        return True
    for part in parts:
        if typing.get_origin(part) is typing.Literal:
            if value in typing.get_args(part):
                return True
        elif part is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return True
        elif isinstance(value, part) and (part is bool or not isinstance(value, bool)):
            return True
    return False


def _words(hint: Any) -> str:
    words: list[str] = []
    for part in _parts(hint):
        if typing.get_origin(part) is typing.Literal:
            words += [repr(option) for option in typing.get_args(part)]
        else:
            words.append("null" if part is type(None) else part.__name__)
    return " or ".join(words)


def _name(target: Callable[..., Any]) -> str:
    return getattr(target, "__qualname__", str(target))
