"""openpi's PyTorch export of pi0 and pi0.5, as its `examples/convert_jax_model_to_pytorch.py` writes it.

    config.json                          action_dim, action_horizon, paligemma_variant, action_expert_variant
    model.safetensors                    one tensor of the tied embedding, and all others
    assets/<asset>/norm_stats.json       {"norm_stats": {"state" | "actions": {"mean", "std", "q01", "q99"}}}

pi0.5 is told by its tensors. Its `pi05_libero` does not read the state, which no file says: write
`"discrete_state_input": false` into config.json before importing it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from librobot.errors import LibrobotError, nearest
from librobot.interchange import paligemma_expert as table
from librobot.interchange.base import Imported, ImportOptions
from librobot.interchange.files import read_json, read_tensors
from librobot.types import Camera, Dim, RobotSpec

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
SIDE = 224
EPSILON = 1e-6  # what openpi adds to a standard deviation and to a range of quantiles
PROMPT_TOKENS = {"pi0": 48 - 2, "pi05": 200}  # pi0's beginning and line break are not of the instruction


def fits(folder: Path) -> bool:
    path = folder / "config.json"
    if not path.is_file() or not (folder / "model.safetensors").is_file():
        return False
    config = read_json(path)
    return "action_horizon" in config and "action_expert_variant" in config


def read(folder: Path, options: ImportOptions) -> Imported:
    config = read_json(folder / "config.json")
    path = folder / "model.safetensors"
    theirs = read_tensors(path)
    pi05 = "time_mlp_in.weight" in theirs
    framework = "pi05" if pi05 else "pi0"
    weights = table.weight_map(pi05=pi05).to_ours(table.with_tied(theirs), str(path))
    statistics = read_statistics(folder, options.embodiment, quantiles=pi05)
    own: dict[str, Any] = {"vlm.max_prompt_tokens": PROMPT_TOKENS[framework]}
    if pi05:
        own["framework.max_prompt_tokens"] = PROMPT_TOKENS[framework]
        own["framework.state_in_prompt"] = config.get("discrete_state_input", True)
    else:
        own["framework.max_state_dim"] = config["action_dim"]
    return Imported(
        choices={"framework": framework, "vlm": "paligemma", "head": "flow_matching"},
        values={
            **table.expert_values(weights),
            **own,
            "framework.horizon": config["action_horizon"],
            "framework.picture_size": [SIDE, SIDE],
        },
        spec=RobotSpec(
            name=options.robot or f"openpi_{framework}",
            cameras=tuple(Camera(name, SIDE, SIDE) for name in CAMERAS),
            state=tuple(Dim(f"state_{i}") for i in range(len(statistics["state"]["mean"]))),
            action=tuple(Dim(f"action_{i}") for i in range(len(statistics["action"]["mean"]))),
            control_hz=options.control_hz,
        ),
        weights=weights,
        statistics=statistics,
        files=table.backbone_files(weights, options.tokenizer or table.TOKENIZER),
    )


def read_statistics(folder: Path, asset: str | None, *, quantiles: bool) -> dict[str, dict[str, np.ndarray]]:
    """For `Normalizer.fit`. `asset` chooses among several."""
    found = {
        path.parent.relative_to(folder / "assets").as_posix(): path
        for path in sorted((folder / "assets").rglob("norm_stats.json"))
    }
    if not found:
        raise LibrobotError(
            f"{folder / 'assets'}: expected norm_stats.json in a folder of it, found none; copy the assets "
            f"folder of the original checkpoint there"
        )
    if asset is None and len(found) > 1:
        raise LibrobotError(
            f"{folder / 'assets'}: found statistics of {', '.join(found)}; choose one by embodiment=NAME"
        )
    name = next(iter(found)) if asset is None else asset
    if name not in found:
        raise LibrobotError(f"{folder / 'assets'}: no statistics {name!r}; {nearest(name, found)}")
    stored = read_json(found[name]).get("norm_stats", {})
    statistics = {}
    for ours, theirs in (("state", "state"), ("action", "actions")):
        own = {key: value for key, value in stored.get(theirs, {}).items() if value is not None}
        needed = ("mean", "std", *(("q01", "q99") if quantiles else ()))
        missing = [key for key in needed if key not in own]
        if missing:
            raise LibrobotError(
                f"{found[name]}: expected {', '.join(needed)} of {theirs!r}, found no {missing[0]}"
            )
        arrays = {key: np.asarray(value, dtype=np.float64) for key, value in own.items()}
        arrays["std"] = arrays["std"] + EPSILON
        if "q99" in arrays:
            arrays["q99"] = arrays["q99"] + EPSILON
        statistics[ours] = arrays
    return table.with_ranges(statistics)
