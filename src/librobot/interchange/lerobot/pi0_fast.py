"""lerobot's pi0_fast (`"type": "pi0_fast"`): PaliGemma whose language model writes FAST tokens.

Unlike openpi it puts a start token before the answer, leaves capital letters, and trains input and output
embeddings apart. The FAST tokenizer is a repository of its own: a folder of it is looked for where
`action_tokenizer_name` says, or as `action_tokenizer` in the checkpoint's folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from librobot.errors import LibrobotError
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
from librobot.interchange.lerobot.pi0 import VARIANTS, tokenizer_step
from librobot.interchange.weights import Rule, WeightMap
from librobot.policy import Policy
from librobot.tokenizers.fast import PROCESSOR_FILE, TOKENIZER_FILE

RELATIVE = True  # relative actions are written, see `relative`
PREFIX = "model.paligemma_with_expert.paligemma."
EMBEDDING, OUTPUT = f"{PREFIX}model.language_model.embed_tokens.weight", f"{PREFIX}lm_head.weight"


def weight_map() -> WeightMap:
    """Input and output embeddings are two tensors, as lerobot trains them."""
    return WeightMap([Rule(f"{PREFIX}*", "vlm.model.*")], absent=("normalizer.*", "tokens.ids"))


def read(folder: LeRobotFolder, options: ImportOptions) -> Imported:
    from librobot.vlms.loading import load_tokenizer

    config, place = folder.config, folder.path / "config.json"
    if config["n_action_steps"] != config["chunk_size"]:
        raise LibrobotError(
            f"{place}: n_action_steps must be chunk_size ({config['chunk_size']}), as a chunk's text is "
            f"decoded whole, found {config['n_action_steps']}"
        )
    fast = action_tokenizer(folder)
    size = json.loads((fast / PROCESSOR_FILE).read_text(encoding="utf-8"))["vocab_size"]
    skip = config["fast_skip_tokens"]
    tokenizer = options.tokenizer or config.get("text_tokenizer_name") or table.TOKENIZER
    weights = weight_map().to_ours(complete(folder.weights()), str(folder.path / "model.safetensors"))
    files = table.backbone_files(weights, tokenizer)
    text = json.loads(files["config.json"])
    text["tie_word_embeddings"] = text["text_config"]["tie_word_embeddings"] = False
    words = load_tokenizer(tokenizer).vocab_size
    spec = folder.spec(options)
    real = [camera.name for camera in spec.cameras if not camera.name.startswith("empty_camera_")]
    return Imported(
        choices={"framework": "pi0_fast", "vlm": "paligemma", "head": "fast_greedy"},
        values={
            **relative.representation(folder, spec),
            "framework.horizon": config["chunk_size"],
            "framework.normalization": folder.normalization(),
            "framework.picture_size": list(config["image_resolution"]),
            "framework.skip_tokens": skip,
            "framework.lowercase": False,
            "framework.start": "begin",
            "head.tokenizer.checkpoint": str(fast),
            "head.tokenizer.vocab_size": size,
            "head.temperature": config["temperature"],
            "vlm.max_prompt_tokens": config["tokenizer_max_length"] - 2,
        },
        spec=spec.with_cameras(real),
        weights={**weights, "tokens.ids": words - 1 - skip - torch.arange(size)},
        statistics=table.with_ranges(folder.our_statistics()),
        files={**files, "config.json": json.dumps(text, indent=2)},
    )


def write(policy: Policy) -> Exported:
    """Raises LibrobotError where lerobot's policy could not be this one."""
    framework: Any = policy.framework
    vlm, tokenizer = framework.vlm, framework.head.tokenizer.inner
    problems = [
        (type(vlm).__name__, "PaliGemma", "vlm"),
        (framework.decoder.start != (), True, "framework.start=begin"),
        (framework.lowercase, False, "framework.lowercase"),
        (framework.tokens.embedding is None, True, "a vocabulary with room for the action tokens"),
        (vlm.hidden_size in VARIANTS, True, "a width of 2048 or 1024"),
    ]
    for found, wanted, what in problems:
        if found != wanted:
            raise LibrobotError(f"lerobot's pi0_fast needs {what}: expected {wanted}, found {found}")
    length = vlm.processor.max_prompt_tokens + 2
    device = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
    moved = relative.exported(policy)
    before, behind = relative.steps(moved)
    skip = vlm.vocabulary.num_text - 1 - int(framework.tokens.ids[0])
    return Exported(
        config={
            "type": "pi0_fast",
            "chunk_size": framework.horizon,
            "n_action_steps": framework.horizon,
            "paligemma_variant": VARIANTS[vlm.hidden_size],
            "dtype": "float32",
            "image_resolution": list(framework.picture_size or (224, 224)),
            "tokenizer_max_length": length,
            "action_tokenizer_name": tokenizer.checkpoint or "lerobot/fast-action-tokenizer",
            "fast_skip_tokens": skip,
            "temperature": framework.head.temperature,
            "normalization_mapping": mapping_of(framework.normalizer.modes),
            "device": "cpu",
            **moved,
        },
        weights=separate(weight_map().to_theirs(framework.state_dict(), "pi0_fast")),
        statistics=statistics_of(policy),
        preprocessor=[
            {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
            {"registry_name": "to_batch_processor", "config": {}},
            *before,
            {"registry_name": NORMALIZER},
            {"registry_name": "pi0_fast_prepare_state_tokenizer_processor_step", "config": {}},
            tokenizer_step(policy, length),
            {
                "registry_name": "action_tokenizer_processor",
                "config": {"action_tokenizer_name": tokenizer.checkpoint or "lerobot/fast-action-tokenizer"},
            },
            device,
        ],
        postprocessor=behind,
    )


def complete(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both embeddings, where the file holds only one name of a tied pair; no part may come without the prefix
    that lerobot's loader adds."""
    named = {name if name.startswith("model.") else f"model.{name}": x for name, x in weights.items()}
    held = named.get(EMBEDDING, named.get(OUTPUT))
    return named if held is None else {EMBEDDING: held, OUTPUT: held} | named


def separate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in weights.items()}


def action_tokenizer(folder: LeRobotFolder) -> Path:
    """The folder of the FAST tokenizer. Raises LibrobotError where it is not on this machine."""
    named = str(folder.config["action_tokenizer_name"])
    for path in (Path(named), folder.path / "action_tokenizer"):
        if (path / TOKENIZER_FILE).is_file() and (path / PROCESSOR_FILE).is_file():
            return path
    raise LibrobotError(
        f"{folder.path}: the FAST tokenizer {named!r} is a repository of its own; download its "
        f"{TOKENIZER_FILE} and {PROCESSOR_FILE} into {folder.path / 'action_tokenizer'}"
    )
