"""lerobot's groot (`"type": "groot"`): GR00T N1.7.

Its config.json holds no sizes of the model: they stand in that of the base model, a hub name or a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from librobot.errors import LibrobotError
from librobot.interchange import gr00t_config as configs
from librobot.interchange.base import Imported, ImportOptions
from librobot.interchange.files import read_json, read_tensors
from librobot.interchange.gr00t_actions import (
    NARROWEST,
    joined,
    relative_groups,
    representation,
    seen_actions,
)
from librobot.interchange.gr00t_weights import weight_map, with_tied
from librobot.interchange.lerobot import relative as plain
from librobot.interchange.lerobot.folder import ACTION, STATE, LeRobotFolder
from librobot.types import RobotSpec

PREFIX = "_groot_model."
PACK, ENCODE = "groot_n1_7_pack_inputs_v1", "groot_n1_7_vlm_encode_v1"


def read(folder: LeRobotFolder, options: ImportOptions) -> Imported:
    config, place = folder.config, folder.path / "config.json"
    pack, encode = step(folder, PACK), step(folder, ENCODE)["config"]
    packed = pack["config"]
    base = Path(config["base_model_path"]).expanduser() / "config.json"
    sizes = read_json(base) if base.is_file() else configs.PUBLISHED_N17
    values = configs.n17_values(sizes, base if base.is_file() else place)
    size, crop = encode.get("image_target_size"), encode.get("image_crop_size")
    share = encode.get("crop_fraction") or (crop[0] / size[0] if size and crop else 1.0)
    weights = weight_map(prefix=PREFIX).to_ours(
        with_tied(folder.weights(), PREFIX), str(folder.path / "model.safetensors")
    )
    spec = folder.spec(options)
    actions, statistics = actions_of(folder, pack, spec, values["framework.horizon"])
    names = packed.get("video_modality_keys") or sorted(spec.camera_names)
    cameras = {camera.name: camera for camera in spec.cameras}
    return Imported(
        choices={"framework": "groot_n17", "vlm": "cosmos_reason2", "head": "flow_matching_groot"},
        values={
            **values,
            "actions": representation({spec.name: actions}, [spec], place),
            "framework.step_statistics": any(value.ndim > 1 for value in statistics["action"].values()),
            "framework.slots": [packed["embodiment_mapping"].get(packed["embodiment_tag"], 0)],
            "framework.normalization": {"state": "min_max", "action": "min_max"},
            "framework.clip_normalized": packed.get("clip_outliers", True),
            "framework.formalize_language": packed.get("formalize_language", True),
            "framework.picture_size": size,
            "framework.picture_crop": share,
            "vlm.pretrained": False,
        },
        spec=type(spec)(
            name=spec.name,
            cameras=tuple(cameras[name] for name in names if name in cameras),
            state=spec.state,
            action=spec.action,
            control_hz=spec.control_hz,
        ),
        weights=weights,
        statistics=statistics,
        minimum_spread=NARROWEST if packed.get("clip_outliers", True) else None,
        files=configs.qwen_files(options.tokenizer or configs.TOKENIZER_N17, values["vlm.num_layers"]),
    )


def actions_of(
    folder: LeRobotFolder, pack: dict[str, Any], spec: RobotSpec, horizon: int
) -> tuple[list[dict[str, Any]], dict[str, dict[str, np.ndarray]]]:
    """The groups of `actions=`, and the statistics, of each step where the checkpoint has them."""
    packed, place = pack["config"], folder.path / "policy_preprocessor.json"
    groups, known = packed.get("modality_config") or {}, packed.get("raw_stats") or {}
    relative = {}
    if "action" in groups:
        relative = relative_groups(packed["embodiment_tag"], groups["action"], known, place)
    if relative:
        state, action = (groups[key]["modality_keys"] for key in ("state", "action"))
        statistics = {
            "state": joined(known, "state", state, place),
            "action": joined(known, "action", action, place, relative=list(relative), steps=horizon),
        }
        return seen_actions(relative, known, spec, state=state, action=action), statistics
    statistics = {}
    for name, tensor in read_tensors(folder.path / pack["state_file"]).items():
        feature, _, statistic = name.rpartition(".")
        key = {STATE: "state", ACTION: "action"}.get(feature, feature)
        statistics.setdefault(key, {})[statistic] = tensor.float().numpy()
    return plain.groups(folder, spec), statistics


def step(folder: LeRobotFolder, name: str) -> dict[str, Any]:
    """A step of the preprocessor. Raises LibrobotError where there is none."""
    steps = read_json(folder.path / "policy_preprocessor.json").get("steps", [])
    found = next((item for item in steps if item.get("registry_name") == name), None)
    if found is None or (name == PACK and "state_file" not in found):
        raise LibrobotError(
            f"{folder.path / 'policy_preprocessor.json'}: expected a step {name!r}"
            f"{' with a state_file' if name == PACK else ''}, found none; without statistics the policy "
            f"cannot act"
        )
    return found
