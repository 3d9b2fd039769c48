"""lerobot's groot (`"type": "groot"`): GR00T N1.7.

Its config.json holds no sizes of the model: they stand in that of the base model, a hub name or a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from librobot.errors import LibrobotError
from librobot.interchange import gr00t_config as configs
from librobot.interchange.base import Imported, ImportOptions
from librobot.interchange.files import read_json, read_tensors
from librobot.interchange.gr00t_weights import weight_map, with_tied
from librobot.interchange.lerobot.folder import ACTION, STATE, LeRobotFolder

PREFIX = "_groot_model."
PACK, ENCODE = "groot_n1_7_pack_inputs_v1", "groot_n1_7_vlm_encode_v1"


def read(folder: LeRobotFolder, options: ImportOptions) -> Imported:
    config, place = folder.config, folder.path / "config.json"
    pack, encode = step(folder, PACK), step(folder, ENCODE)["config"]
    packed = pack["config"]
    if config.get("use_relative_actions", False) or relative(packed.get("modality_config")):
        raise LibrobotError(
            f"{place}: the policy's actions are relative to the state, which librobot's groot does not read; "
            f"choose a checkpoint with use_relative_actions=false"
        )
    base = Path(config["base_model_path"]).expanduser() / "config.json"
    sizes = read_json(base) if base.is_file() else configs.PUBLISHED_N17
    values = configs.n17_values(sizes, base if base.is_file() else place)
    size, crop = encode.get("image_target_size"), encode.get("image_crop_size")
    share = encode.get("crop_fraction") or (crop[0] / size[0] if size and crop else 1.0)
    weights = weight_map(prefix=PREFIX).to_ours(
        with_tied(folder.weights(), PREFIX), str(folder.path / "model.safetensors")
    )
    statistics: dict[str, dict[str, Any]] = {}
    for name, tensor in read_tensors(folder.path / pack["state_file"]).items():
        feature, _, statistic = name.rpartition(".")
        key = {STATE: "state", ACTION: "action"}.get(feature, feature)
        statistics.setdefault(key, {})[statistic] = tensor.float().numpy()
    spec = folder.spec(options)
    names = packed.get("video_modality_keys") or sorted(spec.camera_names)
    cameras = {camera.name: camera for camera in spec.cameras}
    return Imported(
        choices={"framework": "groot_n17", "vlm": "cosmos_reason2", "head": "flow_matching_groot"},
        values={
            **values,
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
        files=configs.qwen_files(options.tokenizer or configs.TOKENIZER_N17, values["vlm.num_layers"]),
    )


def step(folder: LeRobotFolder, name: str) -> dict[str, Any]:
    """A step of the preprocessor. Raises LibrobotError where there is none."""
    path = folder.path / "policy_preprocessor.json"
    steps = read_json(path).get("steps", [])
    found = next((item for item in steps if item.get("registry_name") == name), None)
    if found is None or (name == PACK and "state_file" not in found):
        raise LibrobotError(
            f"{path}: expected a step {name!r}{' with a state_file' if name == PACK else ''}, found "
            f"{[item.get('registry_name') for item in steps]}; without statistics the policy cannot act"
        )
    return found


def relative(groups: Any) -> bool:
    """Whether any group of actions is relative to the state."""
    how = ((groups or {}).get("action") or {}).get("action_configs") or []
    return any(str(item.get("rep", "")).lower().endswith("relative") for item in how)
