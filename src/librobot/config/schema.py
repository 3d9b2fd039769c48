"""The typed roots of the commands' configurations: which keys exist and what their values are.

Groups are open dictionaries here: their contents are held against the signature of their `_target_` by
`librobot.config.check`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from librobot.errors import LibrobotError, nearest

Group = dict[str, Any]
# Keys that the configurations of earlier versions lack, or that only some frameworks name.
PARTS = ("network", "state_encoder", "history", "fusion")
OPTIONAL = ("augmentation", "actions", "adapter", "param_groups", *PARTS)


@dataclass
class TrainConfig:
    """The root of librobot-train (conf/train.yaml)."""

    seed: int = MISSING
    name: str | None = None
    run_dir: str | None = None
    ckpt: str | None = None
    objective: str | None = None
    env: Group | None = None
    data: Group = MISSING
    augmentation: Group | None = None
    actions: Group | None = None
    robot: Group | None = None
    framework: Group = MISSING
    vlm: Group = MISSING
    adapter: Group | None = None
    head: Group = MISSING
    network: Group | None = None
    state_encoder: Group | None = None
    history: Group | None = None
    fusion: Group | None = None
    optim: Group = MISSING
    param_groups: Group | None = None
    scheduler: Group = MISSING
    trainer: Group = MISSING
    callbacks: Group = MISSING
    logger: Group = MISSING


@dataclass
class EvalConfig:
    """The root of librobot-eval (conf/eval.yaml)."""

    policy: str = MISSING
    ckpt: str | None = None
    device: str | None = None
    output_dir: str | None = None
    episodes: int = MISSING
    seed: int = MISSING
    kinds: list[str] | None = None
    num_envs: int = MISSING
    num_workers: int | None = None
    execute_steps: int | None = None
    num_steps: int | None = None
    guidance: float | None = None
    ensemble: float | None = None
    controls: list[str] = MISSING
    control_episodes: int | None = None
    videos_per_kind: int = MISSING
    wandb: bool = False
    env: Group = MISSING


@dataclass
class RecordConfig:
    """The root of librobot-record (conf/record.yaml)."""

    output: str = MISSING
    episodes: int = MISSING
    kinds: list[str] | None = None
    seed: int = MISSING
    num_workers: int = MISSING
    noise: float = MISSING
    image_format: str = MISSING
    resume: bool = MISSING
    env: Group = MISSING


def check_root(cfg: DictConfig, schema: type = TrainConfig) -> None:
    """Raise LibrobotError where the root of `cfg` has a key that `schema` lacks or another type of value."""
    names = list(schema.__dataclass_fields__)  # type: ignore[attr-defined]
    unknown = [str(key) for key in cfg if key not in names]
    if unknown:
        raise LibrobotError(
            f"{unknown[0]}: the configuration has no such key at its root; {nearest(unknown[0], names)}"
        )
    for name in names:
        if OmegaConf.is_missing(cfg, name):
            continue  # reported with all the others by check()
        if name not in cfg and name in OPTIONAL:
            continue
        if name not in cfg:
            raise LibrobotError(
                f"{name}: missing from the configuration (is its group in the defaults list?)"
            )
        try:
            OmegaConf.structured(schema)[name] = cfg[name]
        except OmegaConfBaseException as error:
            expected = _words(schema.__annotations__[name])
            raise LibrobotError(f"{name}: expected {expected}, found {cfg[name]!r}") from error


def _words(annotation: str) -> str:
    """An annotation of the schema as users call it."""
    words = {
        "str": "a text",
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "list[str]": "a list of names",
        "Group": "one of the group's options",
        "None": "null",
    }
    return " or ".join(words[part] for part in annotation.split(" | "))
