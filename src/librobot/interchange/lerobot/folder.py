"""The files of a checkpoint of lerobot 0.6: config.json, model.safetensors, processors, statistics."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from librobot.errors import LibrobotError
from librobot.interchange.base import ImportOptions
from librobot.interchange.files import read_json, read_tensors
from librobot.policy import Policy
from librobot.types import Camera, Dim, RobotSpec

STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
NORMALIZER, UNNORMALIZER = "normalizer_processor", "unnormalizer_processor"
NORMALIZATION = {
    "MEAN_STD": "mean_std",
    "MIN_MAX": "min_max",
    "QUANTILES": "quantile",
    "IDENTITY": "identity",
}
EPSILON = 1e-8  # what lerobot's normalizer adds to a standard deviation
MINIMUM_SPREAD = 1.0001e-4  # just above that of `Normalizer`, in float32 too


class LeRobotFolder:
    """A checkpoint to read: `pretrained_model` of a run, or what a hub repository holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = read_json(path / "config.json")
        self.type = str(self.config.get("type"))

    @staticmethod
    def fits(folder: Path) -> bool:
        """Whether the folder has a config.json with a policy's type and features, as lerobot writes it."""
        path = folder / "config.json"
        if not path.is_file():
            return False
        config = read_json(path)
        return "type" in config and "output_features" in config

    def weights(self) -> dict[str, Tensor]:
        """The tensors of model.safetensors, by lerobot's names."""
        return read_tensors(self.path / "model.safetensors")

    @cached_property
    def statistics(self) -> dict[str, dict[str, np.ndarray]]:
        """Feature -> statistic -> values, from the preprocessor's normalizer."""
        steps = read_json(self.path / "policy_preprocessor.json").get("steps", [])
        step = next((step for step in steps if step.get("registry_name") == NORMALIZER), None)
        if step is None or "state_file" not in step:
            path = self.path / "policy_preprocessor.json"
            raise LibrobotError(
                f"{path}: expected a step {NORMALIZER!r} with a state_file, "
                f"found {[step.get('registry_name') for step in steps]}; without statistics it cannot act"
            )
        found: dict[str, dict[str, np.ndarray]] = {}
        for name, value in read_tensors(self.path / step["state_file"]).items():
            feature, _, statistic = name.rpartition(".")
            found.setdefault(feature, {})[statistic] = value.float().numpy()
        return found

    def our_statistics(self) -> dict[str, dict[str, np.ndarray]]:
        """For `Normalizer.fit`. Features that nothing normalises may be missing."""
        named = {"state": STATE, "action": ACTION}
        return {
            ours: widened(self.statistics[theirs])
            for ours, theirs in named.items()
            if theirs in self.statistics
        }

    def expect(self, **fixed: Any) -> None:
        """Raises LibrobotError where config.json has another value than ours stands for."""
        for key, value in fixed.items():
            if self.config.get(key, value) != value:
                raise LibrobotError(
                    f"{self.path / 'config.json'}: {key} must be {value}, found {self.config[key]}; librobot "
                    f"has no option for it"
                )

    def picture_statistics(self) -> dict[str, list[Any]]:
        """`mean` and `std` of pixels in [0, 1] that normalise pictures as the checkpoint does: three numbers,
        or where cameras differ three for each."""
        mode = str(self.config["normalization_mapping"].get("VISUAL", "IDENTITY"))
        rows: dict[str, list[list[float]]] = {"mean": [], "std": []}
        for key in self.camera_keys:
            mean: np.ndarray
            std: np.ndarray
            own = {name: value.reshape(-1) for name, value in self.statistics.get(key, {}).items()}
            if mode == "IDENTITY":
                mean, std = np.zeros(3), np.ones(3)
            elif mode == "MEAN_STD":
                mean, std = own["mean"], own["std"] + EPSILON
            elif mode == "MIN_MAX":
                mean, std = (own["max"] + own["min"]) / 2, (own["max"] - own["min"]) / 2
            else:
                raise LibrobotError(
                    f"{self.path / 'config.json'}: normalization_mapping of VISUAL must be IDENTITY, "
                    f"MEAN_STD or MIN_MAX, found {mode}"
                )
            rows["mean"].append(mean.tolist())
            rows["std"].append(std.tolist())
        return {name: own[0] if own.count(own[0]) == len(own) else own for name, own in rows.items() if own}

    def normalization(self) -> dict[str, str]:
        """Our mode for the state and for the action."""
        mapping = self.config["normalization_mapping"]
        modes = {}
        for ours, theirs in (("state", "STATE"), ("action", "ACTION")):
            name = str(mapping.get(theirs, "IDENTITY"))
            if name not in NORMALIZATION:
                raise LibrobotError(
                    f"{self.path / 'config.json'}: normalization_mapping of {theirs} must be one of "
                    f"{', '.join(NORMALIZATION)}, found {name!r}"
                )
            modes[ours] = NORMALIZATION[name]
        return modes

    @property
    def camera_keys(self) -> list[str]:
        """The visual features, in the order in which the policy takes them."""
        features = self.config["input_features"]
        return [name for name, feature in features.items() if feature["type"] == "VISUAL"]

    def spec(self, options: ImportOptions) -> RobotSpec:
        """The robot that the features describe; lerobot's checkpoints name neither dimensions nor a rate."""
        inputs, outputs = self.config["input_features"], self.config["output_features"]
        cameras = []
        for key in self.camera_keys:
            _, height, width = inputs[key]["shape"]
            cameras.append(Camera(key.removeprefix(IMAGES).removeprefix("observation."), height, width))
        state_dim = inputs[STATE]["shape"][0] if STATE in inputs else 0
        names = self.config.get("action_feature_names") or [
            f"action_{index}" for index in range(outputs[ACTION]["shape"][0])
        ]
        return RobotSpec(
            name=options.robot or f"lerobot_{self.type}",
            cameras=tuple(cameras),
            state=tuple(Dim(f"state_{index}") for index in range(state_dim)),
            action=tuple(Dim(name) for name in names),
            control_hz=options.control_hz,
        )


def widened(statistics: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Statistics that keep lerobot's map of a dimension that never changes: it maps the value to 0 (MEAN_STD)
    or -1 (MIN_MAX), and back whatever the network says. Ours would only centre it."""
    made = dict(statistics)
    if "std" in made:
        made["std"] = np.maximum(made["std"], MINIMUM_SPREAD)
    if "min" in made and "max" in made:
        made["max"] = np.maximum(made["max"], made["min"] + 2 * MINIMUM_SPREAD)
    return made


def picture_statistics_of(mean: Tensor, std: Tensor, cameras: Sequence[str]) -> dict[str, Any]:
    """The other way round, from a network's (n, 3, 1, 1): for `Exported.statistics`, with VISUAL at
    MEAN_STD."""
    rows = {
        name: (value.double().cpu().numpy()[:, :, 0, 0]) for name, value in (("mean", mean), ("std", std))
    }
    rows["std"] = rows["std"] - EPSILON
    return {
        f"{IMAGES}{camera}": {
            name: own[index if len(own) > 1 else 0].reshape(3, 1, 1) for name, own in rows.items()
        }
        for index, camera in enumerate(cameras)
    }


@dataclass(frozen=True)
class Exported:
    """What a policy becomes: the dictionary of config.json without its features, tensors by lerobot's names,
    statistics of our keys, the preprocessor's steps ({"registry_name", "config"}; the normalizer's config is
    filled in; None: rename, batch, device, normalize) and those behind the unnormalizer."""

    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    statistics: Mapping[str, Mapping[str, np.ndarray]]
    preprocessor: Sequence[Mapping[str, Any]] | None = None
    postprocessor: Sequence[Mapping[str, Any]] = ()


def features_of(spec: RobotSpec) -> dict[str, dict[str, Any]]:
    """`input_features` and `output_features` of config.json."""
    inputs: dict[str, Any] = {}
    if spec.state_dim:
        inputs[STATE] = {"type": "STATE", "shape": [spec.state_dim]}
    for camera in spec.cameras:
        inputs[f"{IMAGES}{camera.name}"] = {"type": "VISUAL", "shape": [3, camera.height, camera.width]}
    return {
        "input_features": inputs,
        "output_features": {ACTION: {"type": "ACTION", "shape": [spec.action_dim]}},
    }


def mapping_of(modes: Mapping[str, str]) -> dict[str, str]:
    """`normalization_mapping` of config.json for our modes; pictures stay as they are."""
    theirs = {ours: name for name, ours in NORMALIZATION.items()}
    return {"VISUAL": "IDENTITY", "STATE": theirs[modes["state"]], "ACTION": theirs[modes["action"]]}


def statistics_of(policy: Policy) -> dict[str, dict[str, np.ndarray]]:
    """lerobot's statistics that give the same normalisation as the policy's own."""
    normalizer = policy.framework.normalizer
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, mode in normalizer.modes.items():
        offset, scale = (
            getattr(normalizer, f"{key}_{part}").double().cpu().numpy() for part in ("offset", "scale")
        )
        low, high = offset - scale, offset + scale
        found[key] = {
            "mean_std": {"mean": offset, "std": scale - EPSILON},
            "min_max": {"min": low, "max": high},
            "quantile": {"q01": low, "q99": high},
            "identity": {"mean": np.zeros_like(offset), "std": np.ones_like(scale)},
        }[mode]
    return found


def write_folder(exported: Exported, policy: Policy, folder: Path) -> None:
    """Write all files beside `folder`, then rename: either the whole folder is there, or nothing."""
    from safetensors.torch import save_file

    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    features = features_of(policy.spec) | {
        key: exported.config[key] for key in ("input_features", "output_features") if key in exported.config
    }
    config = {**exported.config, **features}
    _write_json(partial / "config.json", config)
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in exported.weights.items()}
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    named = {"state": STATE, "action": ACTION}
    statistics = {
        f"{named.get(key, key)}.{name}": torch.as_tensor(np.asarray(value), dtype=torch.float32)
        for key, own in exported.statistics.items()
        for name, value in own.items()
    }
    every = {**features["input_features"], **features["output_features"]}
    steps: Sequence[Mapping[str, Any]] = exported.preprocessor or [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
        {"registry_name": NORMALIZER},
    ]
    norm_map = config["normalization_mapping"]
    _write_steps(partial, "policy_preprocessor", steps, every, norm_map, statistics)
    after: Sequence[Mapping[str, Any]] = [
        {"registry_name": UNNORMALIZER},
        *exported.postprocessor,
        {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
    ]
    _write_steps(partial, "policy_postprocessor", after, features["output_features"], norm_map, statistics)
    if folder.is_dir():
        folder.rmdir()  # it is empty
    partial.replace(folder)


def _write_steps(
    folder: Path,
    name: str,
    steps: Sequence[Mapping[str, Any]],
    features: Mapping[str, Any],
    norm_map: Mapping[str, str],
    statistics: Mapping[str, Tensor],
) -> None:
    from safetensors.torch import save_file

    written = []
    for index, step in enumerate(steps):
        made = dict(step)
        if made["registry_name"] in (NORMALIZER, UNNORMALIZER):
            made["config"] = {"eps": EPSILON, "features": features, "norm_map": dict(norm_map)}
            made["state_file"] = f"{name}_step_{index}_{made['registry_name']}.safetensors"
            save_file(dict(statistics), folder / made["state_file"])
        written.append(made)
    _write_json(folder / f"{name}.json", {"name": name, "steps": written})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
