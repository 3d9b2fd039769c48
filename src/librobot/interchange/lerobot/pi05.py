"""lerobot's pi0.5 (`"type": "pi05"`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from librobot.errors import LibrobotError
from librobot.interchange import paligemma_expert as table
from librobot.interchange.base import Imported, ImportOptions
from librobot.interchange.lerobot import pi0
from librobot.interchange.lerobot.folder import Exported, LeRobotFolder
from librobot.interchange.weights import WeightMap
from librobot.policy import Policy

RELATIVE = pi0.RELATIVE


def weight_map() -> WeightMap:
    return table.weight_map(pi05=True, prefix=pi0.PREFIX)


def read(folder: LeRobotFolder, options: ImportOptions) -> Imported:
    made = pi0.imported(folder, options, "pi05", weight_map())
    prompt = {"framework.max_prompt_tokens": folder.config["tokenizer_max_length"]}
    return replace(made, values={**made.values, **prompt})


def write(policy: Policy) -> Exported:
    pi0.check(policy, "pi05")
    framework: Any = policy.framework
    if not framework.state_in_prompt:
        raise LibrobotError("lerobot's pi05 always reads the state: framework.state_in_prompt must be true")
    length = framework.asked.max_prompt_tokens
    return pi0.exported(
        policy,
        "pi05",
        weight_map(),
        max_state_dim=max(32, framework.spec.state_dim),
        tokenizer_max_length=length,
        text_steps=[
            {"registry_name": "pi05_prepare_state_tokenizer_processor_step", "config": {}},
            pi0.tokenizer_step(policy, length),
        ],
    )
