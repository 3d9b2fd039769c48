"""Hydra's and OmegaConf's errors in one clear sentence, with the nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from librobot.config.schema import PARTS
from librobot.errors import nearest

ConfigError = (HydraException, OmegaConfBaseException)


def explain(error: Exception, overrides: Sequence[str], config_name: str) -> str:
    """What a user should read instead of `error`, which composing `config_name` with `overrides` raised."""
    if isinstance(error, MissingConfigException):
        return _unknown_option(error)
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read the override {error.override!r}: expected key=value, or +key=value to add a key "
            f"(a value with commas, spaces or brackets in quotes: 'key=\"a, b\"')"
        )
    if isinstance(error, MissingMandatoryValue):
        key = getattr(error, "full_key", None) or str(error).splitlines()[0].rpartition(" ")[2]
        return f"{key}: a value is needed here; give {key}=VALUE"
    unknown = re.search(r"(In '(?P<where>[^']+)': )?Could not override '(?P<key>[^']+)'", str(error))
    if unknown:
        return _unknown_key(unknown["key"], unknown["where"], overrides, config_name)
    return _plain(error)


def _unknown_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return _plain(error)
    if group.split("/")[0] == "experiment":
        option = f"{group}/{option}".removeprefix("experiment/")
        folder = Path("experiments")
        if not folder.is_dir():
            return (
                f"experiment={option}: experiments are looked up in ./experiments, which does not exist here"
            )
        options = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
        group = "experiment"
    else:
        options = list(error.options or [])
    return f"{group}={option}: the group {group!r} has no such option; {nearest(option, options)}"


def _unknown_key(key: str, where: str | None, overrides: Sequence[str], config_name: str) -> str:
    place = f"in {where}: " if where else ""
    key = key.partition("@")[0]
    if key == "experiment":
        return f"{place}experiment: experiments are looked up in ./experiments, which does not exist here"
    if key.split(".")[0] in PARTS:
        return (
            f"{place}{key}: the chosen framework brings its own and takes none; take framework=custom, which "
            f"is put together from {', '.join(PARTS)} and head"
        )
    node: Any = _compose_without(key, overrides, config_name)
    parts = key.split(".")
    for depth, part in enumerate(parts):
        path = ".".join(parts[:depth])
        if not isinstance(node, DictConfig):
            return f"{place}{key}: {path} holds a value, not keys" if path else f"{place}{key}: no such key"
        if part not in node:
            options = [str(name) for name in node if not str(name).startswith("_")]
            options += ["experiment", "debug"] * (not path and config_name == "train")
            add = f"; to set an argument that the YAML does not name: +{key}=VALUE" if path else ""
            wrong = f"{path}.{part}" if path else part
            return f"{place}{wrong}: there is no such key; {nearest(part, options)}{add}"
        node = OmegaConf.select(node, part)
    return f"{place}{key}: cannot be overridden"


def _compose_without(key: str, overrides: Sequence[str], config_name: str) -> DictConfig | None:
    """The configuration without the override of `key`; without any where the others fail too."""
    others = [text for text in overrides if not re.match(rf"[+~]*{re.escape(key)}\b", text)]
    groups = [text for text in others if "." not in text.split("=")[0]]
    for kept in (others, groups, []):
        try:
            with hydra.initialize_config_module("librobot.conf", version_base="1.3"):
                return hydra.compose(config_name, list(kept))
        except ConfigError:
            continue
    return None


def _plain(error: BaseException) -> str:
    """The message without Hydra's advice on stack traces and OmegaConf's object types."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("object_type=", "reference_type="))]
    if not kept and error.__cause__ is not None:
        return _plain(error.__cause__)
    return "\n".join(kept) or type(error).__name__
