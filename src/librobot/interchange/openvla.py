"""OpenVLA and OpenVLA-OFT in the layout of the model hub: config.json of type "openvla", sharded weights.

OFT adds files of its own: `action_head--*.pt`, `proprio_projector--*.pt`, `noisy_action_projector--*.pt`, and
for OFT+ `vision_backbone--*.pt`, whose layers hold FiLM beside what they were.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from librobot.errors import LibrobotError, nearest
from librobot.interchange.base import Imported, ImportOptions
from librobot.interchange.files import read_json, read_tensors
from librobot.interchange.weights import Rule, WeightMap
from librobot.types import Camera, Dim, DimKind, RobotSpec

DIMS: tuple[tuple[str, DimKind], ...] = (
    ("x", "ee_position"), ("y", "ee_position"), ("z", "ee_position"),
    ("roll", "ee_rotation"), ("pitch", "ee_rotation"), ("yaw", "ee_rotation"), ("gripper", "gripper"),
)  # fmt: skip
EXTRA = ("action_head", "proprio_projector", "noisy_action_projector", "vision_backbone")
CAMERAS = ("primary", "wrist", "wrist_right")
CAMERA_SIZE = 224
CROP = 0.9
"""The share of a picture's area that its training code cuts out."""


def fits(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") == "openvla"


def read(folder: Path, options: ImportOptions) -> Imported:
    """Raises LibrobotError where statistics of several datasets are there and none is chosen."""
    from librobot.vlms.loading import load_tokenizer, text_files
    from librobot.vlms.prismatic import IMAGE, Prismatic, convert_config
    from librobot.vlms.prompts import token_id

    published = read_json(folder / "config.json")
    key, statistics = chosen_statistics(folder, published, options)
    extra = {name: found for name in EXTRA if (found := newest(folder, name)) is not None}
    oft, film = "action_head" in extra, "vision_backbone" in extra
    loaded = {name: torch.load(path, map_location="cpu", weights_only=True) for name, path in extra.items()}
    theirs = read_shards(folder)
    if film:
        theirs = {n: x for n, x in theirs.items() if not n.startswith("vision_backbone.")}
        theirs |= {f"vision_backbone.{n}": x for n, x in bare(loaded.pop("vision_backbone")).items()}
    for name, state in loaded.items():
        theirs |= {f"{name}.{n}": x for n, x in bare(state).items()}

    config = convert_config(str(folder), published, film)
    vision: Any = config.vision_config
    text: Any = config.text_config
    layers = (vision.dino["num_layers"], vision.siglip["num_layers"])
    weights = weight_map(layers).to_ours(theirs, str(folder))
    diffusion = "noisy_action_projector" in extra
    action_dim = len(statistics["action"]["q01"])
    state_dim = 0
    if oft:
        state_dim = sizes(folder, loaded, statistics, text.hidden_size)
        horizon, cameras = chunk_and_cameras(folder, published, options)
    else:
        horizon, cameras = 1, ("primary",)
        weights["tokens.ids"] = 31_999 - torch.arange(256)
    tokenizer = load_tokenizer(options.tokenizer or str(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    config.image_token_index = token_id(tokenizer, IMAGE)
    head = "bins_openvla" if not oft else "ddim" if diffusion else "l1"
    values: dict[str, Any] = {"framework.horizon": horizon, "vlm.film": film}
    values["framework.crop"] = CROP if crops(folder, oft) else None
    if oft:
        values["framework.proprioception"] = bool(state_dim)
    return Imported(
        choices={
            "framework": "openvla_oft" if oft else "openvla",
            "vlm": "prismatic",
            "head": head,
        },
        values=values,
        spec=spec_of(cameras, action_dim, state_dim, options, key),
        weights=weights,
        statistics={
            "action": statistics["action"],
            "state": statistics.get("proprio", empty()) if state_dim else empty(),
        },
        files=text_files(config, tokenizer, Prismatic.default_picture_processor(config)),
    )


def weight_map(layers: tuple[int, int] = (24, 27)) -> WeightMap:
    """The table of tensor names. `layers` are the published vision transformers' numbers, whose last ones,
    and what stands behind them, nothing reads."""
    rules = []
    unused = []
    places = (("featurizer", "dino", layers[0]), ("fused_featurizer", "siglip", layers[1]))
    for start in ("vision_backbone.vision_backbone.", "vision_backbone."):
        for theirs, ours, count in places:
            here, there = f"{start}{theirs}", f"vlm.model.model.vision_tower.{ours}"
            unused += [f"{here}.blocks.{count - 1}.*", f"{here}.norm.*", f"{here}.attn_pool.*"]
            rules += [
                Rule(f"{here}.blocks.*.block.*", f"{there}.blocks.*.*"),
                Rule(f"{here}.*", f"{there}.*"),
            ]
    rules += [
        Rule("projector.*", "vlm.model.model.multi_modal_projector.*"),
        Rule("language_model.model.*", "vlm.model.model.language_model.*"),
        Rule("language_model.lm_head.weight", "vlm.model.lm_head.weight"),
    ]
    for name, ours in (("proprio_projector", "proprio_proj"), ("noisy_action_projector", "noise_proj")):
        rules += [Rule(f"{name}.fc1.*", f"{ours}.0.*"), Rule(f"{name}.fc2.*", f"{ours}.2.*")]
    for start in ("action_head.model.", "action_head.noise_predictor.mlp_resnet."):
        rules += [
            Rule(f"{start}layer_norm1.*", "action_mlp.0.0.*"),
            Rule(f"{start}fc1.*", "action_mlp.0.1.*"),
            *(Rule(f"{start}mlp_resnet_blocks.{i}.ffn.*", f"action_mlp.{i + 1}.branch.*") for i in range(2)),
            Rule(f"{start}layer_norm2.*", "action_mlp.3.*"),
            Rule(f"{start}fc2.*", "action_mlp.4.*"),
        ]
    unused.append("language_model.model.layers.*.self_attn.rotary_emb.inv_freq")
    return WeightMap(rules, unused=unused, absent=("normalizer.*", "tokens.ids"))


def chosen_statistics(
    folder: Path, published: Mapping[str, Any], options: ImportOptions
) -> tuple[str, dict[str, dict[str, np.ndarray]]]:
    """Statistics of one dataset (`options.embodiment`) by our names; where OpenVLA does not normalise a
    dimension (`mask`), the framework leaves it as well."""
    path = folder / "dataset_statistics.json"
    every = published.get("norm_stats") or {}
    if path.is_file():
        every = read_json(path)
    key = options.embodiment
    if key is None and len(every) == 1:
        key = next(iter(every))
    if key is None:
        raise LibrobotError(
            f"{folder}: it holds statistics of {len(every)} datasets; name the robot's with embodiment=, one "
            f"of {', '.join(sorted(every)[:12])}"
        )
    if key not in every:
        raise LibrobotError(f"{folder}: no statistics of {key!r}; {nearest(key, every)}")
    found = {
        part: {n: np.asarray(x, dtype=np.float64) for n, x in every[key][part].items() if n != "mask"}
        for part in ("action", "proprio")
        if part in every[key]
    }
    return key, found


def chunk_and_cameras(
    folder: Path, published: Mapping[str, Any], options: ImportOptions
) -> tuple[int, tuple[str, ...]]:
    """What OFT's training code takes from its command line and writes into no file. Raises LibrobotError
    where it is not given."""
    horizon = published.get("num_actions_chunk", options.horizon)
    count = published.get("num_images_in_input")
    cameras = options.cameras if count is None else CAMERAS[: int(count)]
    if horizon is None:
        raise LibrobotError(
            f"{folder}: no file of OpenVLA-OFT says how many actions a chunk has; name it by --horizon N "
            f"(published: 8 for LIBERO, 25 for ALOHA, 5 for Bridge)"
        )
    if cameras is None:
        raise LibrobotError(
            f"{folder}: no file of OpenVLA-OFT says which pictures it reads; name them in order by --cameras "
            f"NAME,NAME (published: primary,wrist for LIBERO, primary,wrist_left,wrist_right for ALOHA)"
        )
    return int(horizon), cameras


def sizes(
    folder: Path,
    loaded: Mapping[str, Mapping[str, Tensor]],
    statistics: Mapping[str, Mapping[str, np.ndarray]],
    width: int,
) -> int:
    """The state's dimensions, 0 where the policy reads none. Raises LibrobotError where statistics are not of
    as many dimensions as the weights."""
    known = {part: len(own["q01"]) for part, own in statistics.items()}
    head, proprio = bare(loaded["action_head"]), bare(loaded.get("proprio_projector", {}))
    entering = next(x for n, x in head.items() if n.endswith("fc1.weight") and "resnet_blocks" not in n)
    found = {"action": entering.shape[1] // width}
    if proprio:
        found["proprio"] = proprio["fc1.weight"].shape[1]
    for part, dims in found.items():
        if known.get(part) != dims:
            raise LibrobotError(
                f"{folder}: the weights are of {dims} {part} dimensions, its statistics of "
                f"{known.get(part)}; choose another dataset's by --embodiment NAME"
            )
    return found.get("proprio", 0)


def crops(folder: Path, oft: bool) -> bool:
    """Whether training saw random crops, so that the policy has to act on the middle of a picture.

    Its code writes that into the name of a run's folder alone (`--image_aug`). Under another name, what was
    fine-tuned did, as the published ones and the code's own default; the model pretrained on Open
    X-Embodiment, whose folder lacks the statistics that fine-tuning writes, did not.
    """
    name = folder.resolve().name
    if "image_aug" in name or re.search(r"\+b\d+\+lr-", name):
        return "image_aug" in name
    return oft or (folder / "dataset_statistics.json").is_file()


def spec_of(
    cameras: Iterable[str], action_dim: int, state_dim: int, options: ImportOptions, key: str
) -> RobotSpec:
    """An arm's six changes and its gripper where there are seven dimensions; numbers otherwise."""
    if action_dim == len(DIMS):
        action = tuple(
            Dim(name, kind=kind, mode="delta" if kind != "gripper" else "absolute") for name, kind in DIMS
        )
    else:
        action = tuple(Dim(f"action_{i}", kind="joint") for i in range(action_dim))
    return RobotSpec(
        name=options.robot or key,
        cameras=tuple(Camera(name, CAMERA_SIZE, CAMERA_SIZE) for name in cameras),
        state=tuple(Dim(f"state_{i}") for i in range(state_dim)),
        action=action,
        control_hz=options.control_hz,
    )


def read_shards(folder: Path) -> dict[str, Tensor]:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise LibrobotError(f"{folder}: expected *.safetensors, found none; is the download complete?")
    found: dict[str, Tensor] = {}
    for path in paths:
        found |= read_tensors(path)
    return found


def newest(folder: Path, name: str) -> Path | None:
    """The file of that part with the largest step; OFT names it NAME--STEP_checkpoint.pt."""
    paths = list(folder.glob(f"{name}--*.pt"))

    def step(path: Path) -> int:
        digits = path.stem.partition("--")[2].partition("_")[0]
        return int(digits) if digits.isdigit() else 1 << 60

    return max(paths, key=step, default=None)


def bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that DistributedDataParallel puts before every name."""
    return {name.removeprefix("module."): value for name, value in state.items()}


def empty() -> dict[str, np.ndarray]:
    return {name: np.zeros(0) for name in ("mean", "std", "min", "max", "q01", "q99")}
