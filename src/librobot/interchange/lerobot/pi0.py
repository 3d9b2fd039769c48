"""lerobot's pi0 (`"type": "pi0"`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from librobot.errors import LibrobotError
from librobot.heads.flow_matching import FlowMatching
from librobot.interchange import paligemma_expert as table
from librobot.interchange.base import Imported, ImportOptions
from librobot.interchange.lerobot import relative
from librobot.interchange.lerobot.folder import (
    NORMALIZER,
    Exported,
    LeRobotFolder,
    mapping_of,
    statistics_of,
)
from librobot.interchange.weights import WeightMap
from librobot.policy import Policy
from librobot.vlms.paligemma import PaliGemma

PREFIX = "model."
FIXED = {
    "n_obs_steps": 1,
    "time_sampling_scale": 0.999,
    "time_sampling_offset": 0.001,
    "min_period": 4e-3,
    "max_period": 4.0,
}
"""What ours has no option for, and the value it stands for."""
RELATIVE = True  # relative actions are written, see `relative`
VARIANTS = {2048: "gemma_2b", 1024: "gemma_300m"}
"""Width -> lerobot's name of a Gemma; it has no others."""


def weight_map() -> WeightMap:
    return table.weight_map(pi05=False, prefix=PREFIX)


def read(folder: LeRobotFolder, options: ImportOptions) -> Imported:
    made = imported(folder, options, "pi0", weight_map())
    prompt = folder.config["tokenizer_max_length"] - 2  # its beginning and its line break
    values = {"framework.max_state_dim": folder.config["max_state_dim"], "vlm.max_prompt_tokens": prompt}
    return replace(made, values={**made.values, **values})


def write(policy: Policy) -> Exported:
    check(policy, "pi0")
    processor: Any = policy.framework.vlm.processor  # type: ignore[union-attr]
    length = processor.max_prompt_tokens + 2
    return exported(
        policy,
        "pi0",
        weight_map(),
        max_state_dim=policy.framework.state_width,
        tokenizer_max_length=length,
        text_steps=[
            {"registry_name": "pi0_new_line_processor", "config": {}},
            tokenizer_step(policy, length),
        ],
    )


# What pi0 and pi0.5 share.


def imported(folder: LeRobotFolder, options: ImportOptions, framework: str, names: WeightMap) -> Imported:
    config, place = folder.config, folder.path / "config.json"
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise LibrobotError(
                f"{place}: {key} must be {value}, found {config[key]}; librobot's {framework} has no option "
                f"for it"
            )
    weights = names.to_ours(table.with_tied(folder.weights(), PREFIX), str(folder.path / "model.safetensors"))
    spec = folder.spec(options)
    # Empty cameras are always masked: whoever leaves them out sees the same.
    real = [camera.name for camera in spec.cameras if not camera.name.startswith("empty_camera_")]
    return Imported(
        choices={"framework": framework, "vlm": "paligemma", "head": "flow_matching"},
        values={
            **table.expert_values(weights),
            **relative.representation(folder, spec),
            "framework.horizon": config["chunk_size"],
            "framework.normalization": folder.normalization(),
            "framework.picture_size": list(config["image_resolution"]),
            "head.num_steps": config["num_inference_steps"],
            "head.beta_alpha": config["time_sampling_beta_alpha"],
            "head.beta_beta": config["time_sampling_beta_beta"],
        },
        spec=spec.with_cameras(real),
        weights=weights,
        statistics=table.with_ranges(folder.our_statistics()),
        files=table.backbone_files(weights, options.tokenizer or table.TOKENIZER),
    )


def exported(
    policy: Policy, name: str, names: WeightMap, *, text_steps: Sequence[Mapping[str, Any]], **own: Any
) -> Exported:
    """`own` are the values of config.json that the two policies have not in common; `text_steps` make tokens
    of the instruction, before the normalizer for pi0 and behind it for pi0.5."""
    framework: Any = policy.framework
    head, vlm = framework.head, framework.vlm
    assert isinstance(head, FlowMatching)
    own = {**own, **relative.exported(policy)}
    before, behind = relative.steps(own)
    normalizer: list[Mapping[str, Any]] = [*before, {"registry_name": NORMALIZER}]
    beginning: list[Mapping[str, Any]] = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
    ]
    device = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
    middle = [*normalizer, *text_steps, device] if name == "pi05" else [*text_steps, device, *normalizer]
    return Exported(
        config={
            "type": name,
            "n_obs_steps": 1,
            "chunk_size": framework.horizon,
            "n_action_steps": framework.num_future_actions,
            "max_action_dim": framework.action_width,
            "num_inference_steps": head.num_steps,
            "time_sampling_beta_alpha": head.beta_alpha,
            "time_sampling_beta_beta": head.beta_beta,
            "image_resolution": list(framework.picture_size),
            "paligemma_variant": VARIANTS[vlm.hidden_size],
            "action_expert_variant": VARIANTS[framework.width],
            "dtype": "float32",
            "normalization_mapping": mapping_of(framework.normalizer.modes),
            "device": "cpu",
            **own,
        },
        weights=names.to_theirs(framework.state_dict(), name),
        statistics=statistics_of(policy),
        preprocessor=beginning + middle,
        postprocessor=behind,
    )


def tokenizer_step(policy: Policy, length: int) -> dict[str, Any]:
    name = policy.config["vlm"].get("checkpoint") or table.TOKENIZER
    options = {"padding_side": "right", "padding": "max_length", "truncation": True, "task_key": "task"}
    return {
        "registry_name": "tokenizer_processor",
        "config": {"tokenizer_name": name, "max_length": length, **options},
    }


def check(policy: Policy, name: str) -> None:
    """Raises LibrobotError where lerobot's policy could not be this one."""
    framework, head, vlm = policy.framework, policy.framework.head, policy.framework.vlm
    problems = {
        "vlm": (isinstance(vlm, PaliGemma), "paligemma", type(vlm).__name__),
        "head": (type(head) is FlowMatching, "flow_matching", type(head).__name__),
        "head.time_convention": (
            getattr(head, "time_convention", "") == "noise_at_one",
            "noise_at_one",
            getattr(head, "time_convention", None),
        ),
        "framework.obs_steps": (framework.obs_steps == 1, 1, framework.obs_steps),
        "framework.picture_size": (framework.picture_size is not None, "[224, 224]", None),
        "the backbone's and the expert's width": (
            getattr(vlm, "hidden_size", 0) in VARIANTS and framework.width in VARIANTS,
            f"of {list(VARIANTS)}",
            [getattr(vlm, "hidden_size", 0), framework.width],
        ),
        "embodiments": (len(framework.embodiments) == 1, 1, len(framework.embodiments)),
    }
    for place, (fits, expected, found) in problems.items():
        if not fits:
            raise LibrobotError(
                f"lerobot's {name} cannot hold this policy: {place} must be {expected}, found {found}"
            )
