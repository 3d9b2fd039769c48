"""NVIDIA's own folders of GR00T N1.5 and N1.7, as their training writes them and the hub holds them.

config.json                     the model's sizes
model*.safetensors              backbone.*, action_head.*
experiment_cfg/metadata.json    N1.5: statistics and cameras of every robot
statistics.json, processor_config.json, embodiment_id.json    N1.7, beside the weights or in processor/
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from librobot.errors import LibrobotError, nearest
from librobot.interchange import gr00t_config as configs
from librobot.interchange.base import Imported, ImportOptions
from librobot.interchange.files import read_json, read_tensors
from librobot.interchange.gr00t_actions import (
    NARROWEST,
    Start,
    dim_names,
    joined,
    relative_groups,
    representation,
    seen_actions,
)
from librobot.interchange.gr00t_weights import EAGLE, QWEN, weight_map, with_tied
from librobot.normalize import Statistics
from librobot.types import Camera, Dim, RobotSpec

MODEL_TYPES = ("gr00t_n1_5", "Gr00tN1d7")
SLOTS_N15 = {"new_embodiment": 31, "oxe_droid": 17, "agibot_genie1": 26, "gr1": 24}
"""Robot -> its set of weights, which N1.5's folders do not hold."""


def fits(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") in MODEL_TYPES


def read(folder: Path, options: ImportOptions) -> Imported:
    config = read_json(folder / "config.json")
    reader = read_n15 if config["model_type"] == "gr00t_n1_5" else read_n17
    return reader(folder, config, options)


def read_n15(folder: Path, config: Mapping[str, Any], options: ImportOptions) -> Imported:
    """The groups' order in metadata.json is taken for the dimensions', and min_max for every group: which of
    them training used, and how, stands in its code alone."""
    place = folder / "experiment_cfg" / "metadata.json"
    known = read_json(place)
    if options.tokenizer is None:
        raise LibrobotError(
            f"{folder}: the folder of GR00T N1.5 holds no tokenizer; name a folder with Eagle 2.5's by "
            f"--tokenizer FOLDER (NVIDIA keeps it in gr00t/model/backbone/eagle2_hg_model)"
        )
    values = configs.n15_values(config, folder / "config.json")
    robots: list[RobotSpec] = []
    statistics: list[Statistics] = []
    slots: list[int] = []
    for tag in chosen(known, options, place):
        robot = known[tag]
        robots.append(
            spec(
                tag,
                options,
                [(n, *reversed(v["resolution"])) for n, v in robot["modalities"]["video"].items()],
                robot["statistics"],
                robot["statistics"]["state"],
                robot["statistics"]["action"],
                rates=[v.get("fps") for v in robot["modalities"]["video"].values()],
            )
        )
        statistics.append(
            {k: joined(robot["statistics"], k, robot["statistics"][k], place) for k in ("state", "action")}
        )
        if tag not in SLOTS_N15:
            raise LibrobotError(
                f"{place}: robot {tag!r} has no set of weights that is known; {nearest(tag, SLOTS_N15)}"
            )
        slots.append(SLOTS_N15[tag])
    weights = weight_map(backbone=EAGLE).to_ours(tensors(folder), str(folder))
    return made(
        "groot_n15", "eagle25", "flow_matching_groot_n15", values, robots, statistics, slots, weights,
        configs.eagle_files(options.tokenizer, values["vlm.num_layers"]),
    )  # fmt: skip


def read_n17(folder: Path, config: Mapping[str, Any], options: ImportOptions) -> Imported:
    beside = folder if (folder / "statistics.json").is_file() else folder / "processor"
    known = read_json(beside / "statistics.json")
    processor = read_json(beside / "processor_config.json")["processor_kwargs"]
    slot_of = read_json(beside / "embodiment_id.json")
    values = configs.n17_values(config, folder / "config.json")
    size, crop = processor.get("image_target_size"), processor.get("image_crop_size")
    side = size or [256, 256]
    robots: list[RobotSpec] = []
    statistics: list[Statistics] = []
    slots: list[int] = []
    seen: dict[str, list[dict[str, Any]]] = {}
    for tag in chosen(known, options, beside / "statistics.json"):
        own, groups = known[tag], processor["modality_configs"][tag]
        state, action = groups["state"]["modality_keys"], groups["action"]["modality_keys"]
        relative: Mapping[str, Start] = {}
        if processor.get("use_relative_action", False):
            relative = relative_groups(tag, groups["action"], own, beside)
        cameras = [(name, *side) for name in groups["video"]["modality_keys"]]
        robots.append(spec(tag, options, cameras, own, state, action))
        seen[tag] = seen_actions(relative, own, robots[-1], state=state, action=action)
        useful, horizon = len(groups["action"].get("delta_indices", [])), values["framework.horizon"]
        statistics.append(
            {
                "state": joined(own, "state", state, beside),
                "action": joined(own, "action", action, beside, relative=list(relative), steps=horizon),
            }
        )
        slots.append(slot_of[tag])
        if 0 < useful < horizon:
            warnings.warn(
                f"robot {tag!r} was trained on the first {useful} of {horizon} actions of a chunk: execute "
                f"no more of them",
                stacklevel=2,
            )
    mode = "quantile" if processor.get("use_percentiles") else "min_max"
    values |= {
        "actions": representation(seen, robots, beside),
        "framework.step_statistics": any(seen.values()),
        "framework.normalization": {"state": mode, "action": mode},
        "framework.clip_normalized": processor.get("clip_outliers", True),
        "framework.formalize_language": processor.get("formalize_language", True),
        "framework.picture_size": size,
        "framework.picture_crop": crop[0] / side[0] if size and crop else 1.0,
    }
    weights = weight_map(backbone=QWEN).to_ours(with_tied(tensors(folder)), str(folder))
    source = options.tokenizer or config.get("model_name", configs.TOKENIZER_N17)
    return made(
        "groot_n17", "cosmos_reason2", "flow_matching_groot", values, robots, statistics, slots, weights,
        configs.qwen_files(source, values["vlm.num_layers"]),
    )  # fmt: skip


def made(
    framework: str,
    vlm: str,
    head: str,
    values: Mapping[str, Any],
    robots: list[RobotSpec],
    statistics: list[Statistics],
    slots: list[int],
    weights: Mapping[str, Tensor],
    files: Mapping[str, str],
) -> Imported:
    several = len(robots) > 1
    return Imported(
        choices={"framework": framework, "vlm": vlm, "head": head},
        values={**values, "framework.slots": slots, "vlm.pretrained": False},
        spec=union(robots) if several else robots[0],
        weights=weights,
        statistics=statistics if several else statistics[0],
        files=files,
        embodiments=tuple(robots) if several else None,
        minimum_spread=NARROWEST if values.get("framework.clip_normalized") else None,
    )


def chosen(known: Mapping[str, Any], options: ImportOptions, place: Path) -> list[str]:
    """The robots that are wanted. Raises LibrobotError for one that the checkpoint does not know."""
    if options.embodiment is None:
        return list(known)
    if options.embodiment not in known:
        raise LibrobotError(
            f"{place}: the checkpoint does not know robot {options.embodiment!r}; "
            f"{nearest(options.embodiment, known)}"
        )
    return [options.embodiment]


def spec(
    tag: str,
    options: ImportOptions,
    cameras: Iterable[tuple[str, int, int]],
    statistics: Mapping[str, Any],
    state: Iterable[str],
    action: Iterable[str],
    rates: Iterable[float | None] = (),
) -> RobotSpec:
    def dims(key: str, groups: Iterable[str]) -> tuple[Dim, ...]:
        sizes = [(group, np.size(statistics[key][group]["mean"])) for group in groups]
        return tuple(Dim(name) for group, n in sizes for name in dim_names(group, n))

    known = [float(rate) for rate in rates if rate]
    return RobotSpec(
        name=options.robot or tag,
        cameras=tuple(Camera(name, int(height), int(width)) for name, height, width in cameras),
        state=dims("state", state),
        action=dims("action", action),
        control_hz=known[0] if known else options.control_hz,
    )


def union(robots: list[RobotSpec]) -> RobotSpec:
    """All cameras, the widest robot's dimensions."""
    cameras = {camera.name: camera for robot in robots for camera in robot.cameras}
    return replace(
        robots[0],
        name="several",
        cameras=tuple(cameras.values()),
        state=max((robot.state for robot in robots), key=len),
        action=max((robot.action for robot in robots), key=len),
    )


def tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of all shards, in single precision. Raises LibrobotError where one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(read_json(index)["weight_map"].values()))
    else:
        shards = ["model.safetensors"]
    found: dict[str, Tensor] = {}
    for shard in shards:
        found |= read_tensors(folder / shard)
    return {name: value.float() for name, value in found.items()}
