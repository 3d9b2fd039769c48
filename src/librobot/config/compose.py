"""Composing a configuration outside of the commands, and writing and reading resolved ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from librobot.config.explain import ConfigError, explain
from librobot.errors import LibrobotError


def compose(overrides: Sequence[str] = (), config_name: str = "train") -> DictConfig:
    """The configuration that the command of that name would see for these overrides.

    >>> cfg = compose(["framework=pi0", "head=ddpm", "trainer.max_steps=2"])

    Raises LibrobotError on an unknown option or key, with the nearest valid name.
    """
    try:
        with hydra.initialize_config_module("librobot.conf", version_base="1.3"):
            return hydra.compose(config_name, list(overrides))
    except ConfigError as error:
        raise LibrobotError(explain(error, overrides, config_name)) from error


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """`cfg` as plain types: no interpolation left, nothing missing, Hydra's own keys out."""
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except ConfigError as error:
        raise LibrobotError(explain(error, (), "")) from error
    assert isinstance(plain, dict)
    plain.pop("hydra", None)
    return {str(key): value for key, value in plain.items()}


def write(cfg: DictConfig, path: str | os.PathLike) -> Path:
    """Write the resolved configuration as YAML, whole or not at all."""
    target = Path(path)
    text = OmegaConf.to_yaml(OmegaConf.create(resolve(cfg)))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(target)
    return target


def read(path: str | os.PathLike) -> DictConfig:
    """A configuration that `write` wrote, in struct mode: asking for an unknown key is an error."""
    if not Path(path).is_file():
        raise LibrobotError(f"{path}: expected the config.yaml of a run, found no such file")
    cfg = OmegaConf.load(Path(path))
    if not isinstance(cfg, DictConfig):
        raise LibrobotError(f"{path}: expected a mapping of configuration keys, found a list")
    OmegaConf.set_struct(cfg, True)
    return cfg
