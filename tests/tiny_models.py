"""Every framework, head and backbone of the configuration, shrunk to sizes that a test can afford.

The options come from the files in conf/, so a new one is tested without any change here, as long as it uses
the usual names for its sizes.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from librobot.config.build import build_framework
from librobot.frameworks.base import Framework
from librobot.types import Batch, Camera, Dim, Observation, RobotSpec

CONF = Path(__file__).parents[1] / "conf"
HORIZON = 6

# The first pattern that fits an option's name gives its value; options that the node lacks are not added.
SMALL = {
    "horizon": HORIZON,
    "obs_steps": 1,
    "resize": [48, 64],  # a feature map of several cells
    "width": 32,
    "hidden_size": 32,
    "expert_width": 16,
    "tower_width": 16,
    "text_width": 16,
    "mlp_width": 48,
    "feedforward_width": 48,
    "modulation": "adaln",  # gates that start shut would hide the network from a test
    "picture_size": None,  # the pictures are small already
    "clip_normalized": False,  # an untrained policy's actions would all be the limits
    "level_channels": [16, 32],
    "num_levels_read": 2,
    "num_groups": 4,
    "inner_width": 16,
    "head_width": 32,
    "teacher_steps": 2,
    "channels": 16,
    "num_keypoints": 8,
    "image_size": 32,
    "wrist_image_size": 16,
    "stem_channels": [4, 8, 8, 16],
    "stem_width": 16,
    "num_state_bins": 16,
    "num_blocks": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "num_fusion_heads": 4,
    "num_dit_layers": 4,
    "max_positions": 16,
    "num_embodiments": 3,
    "num_*layers": 2,
    "latent_dim": 4,
    "num_train_steps": 20,
    "num_steps": 4,
    "max_state_dim": 8,
    "max_action_dim": 8,
}

SPEC = RobotSpec(
    name="test",
    cameras=(Camera("wrist", 24, 32), Camera("front", 32, 32)),
    state=tuple(Dim(f"s{i}") for i in range(5)),
    action=tuple(Dim(f"a{i}") for i in range(3)),
    control_hz=10.0,
)

NARROW = RobotSpec(
    name="narrow",
    cameras=(Camera("front", 32, 32),),
    state=tuple(Dim(f"n{i}") for i in range(4)),
    action=tuple(Dim(f"m{i}") for i in range(2)),
    control_hz=5.0,
)

PROMPTS = ["reach the red cube", "open", "put the blue cube on the disc", "press the button"]


def options(group: str) -> list[str]:
    """All options of a group; of the backbones those that a test can afford."""
    names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    return [name for name in names if group != "vlm" or "tiny" in name]


def named_options(framework: str) -> dict[str, str]:
    """Group -> option, as the framework's YAML names them: its head, and its other parts."""
    named: dict[str, str] = {}
    for item in written("framework", framework).defaults:
        if isinstance(item, DictConfig):
            named |= {str(key).split("@")[0].strip("/"): value for key, value in item.items()}
        elif item != "_self_":
            named |= named_options(item)
    return named


def natural_head(framework: str) -> str:
    return named_options(framework)["head"]


@functools.cache
def head_kind(head: str) -> str:
    """What the head needs: a denoiser, a decoder, or a pair of them."""
    return get_class(load("head", head)._target_).network


@functools.cache
def fits(framework: str, head: str) -> bool:
    """Whether the framework brings the kind of network that the head needs."""
    return head_kind(head) in get_class(load("framework", framework)._target_).brings


def reading_everything(framework: str) -> dict[str, Any]:
    """Options with which the framework reads the instruction and the state, where it does not by default."""
    target = get_class(load("framework", framework)._target_)
    return {**target.language_options, **target.state_options}


def framework_class(framework: str) -> Any:
    return get_class(load("framework", framework)._target_)


def runs_on(framework: str, vlm: str) -> bool:
    """Whether the backbone has the cache that the framework may need."""
    return not framework_class(framework).needs_cache or get_class(load("vlm", vlm)._target_).has_cache


def parts(framework: str, head: str) -> dict[str, str]:
    """The framework's own parts, with a network of the kind that the head needs."""
    chosen = {group: option for group, option in named_options(framework).items() if group != "head"}
    if "network" in chosen and head_kind(head) != "denoiser":
        chosen["network"] = {"decoder": "causal", "pair": "pair"}[head_kind(head)]
    return chosen


def shrink(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    small = {}
    for key, value in node.items():
        fitting = [new for pattern, new in SMALL.items() if fnmatch.fnmatch(key, pattern)]
        small[key] = fitting[0] if fitting and not isinstance(value, dict) else shrink(value)
    return small


def node(group: str, option: str, **changes: Any) -> dict[str, Any]:
    plain = OmegaConf.to_container(load(group, option))
    return (plain if option.endswith("_tiny") else shrink(plain)) | changes


@functools.cache
def written(group: str, option: str) -> DictConfig:
    """The option's file as it stands. Reading YAML takes longer than most tests."""
    return OmegaConf.load(CONF / group / f"{option}.yaml")


def load(group: str, option: str) -> DictConfig:
    """The option with the options of the same group that it inherits."""
    own = copy.deepcopy(written(group, option))
    inherited = [name for name in own.pop("defaults", []) if isinstance(name, str) and name != "_self_"]
    return OmegaConf.merge(*(load(group, name) for name in inherited), own)


def config(framework: str, head: str | None = None, vlm: str = "tiny", **changes: Any) -> dict[str, Any]:
    named = head or natural_head(framework)
    return {
        "framework": node("framework", framework, **changes),
        "head": node("head", named),
        **{part: node(part, option) for part, option in parts(framework, named).items()},
        "vlm": node("vlm", vlm),
        "optim": {"_target_": "librobot.training.optimizers.adamw", "_partial_": True, "lr": 1e-3},
        "scheduler": {"_target_": "librobot.training.schedules.constant", "_partial_": True},
    }


def statistics(spec: RobotSpec = SPEC) -> dict[str, dict[str, np.ndarray]]:
    """Different for every dimension, so that mixing them up shows."""
    made = {}
    for key, dim in (("state", spec.state_dim), ("action", spec.action_dim)):
        mean, std = np.arange(dim) * 0.5, 1.0 + np.arange(dim)
        made[key] = {
            "mean": mean,
            "std": std,
            "min": mean - 2 * std,
            "max": mean + 2 * std,
            "q01": mean - std,
            "q99": mean + std,
        }
    return made


def build(
    framework: str,
    head: str | None = None,
    vlm: str = "tiny",
    *,
    seed: int = 0,
    robots: tuple[RobotSpec, ...] | None = None,
    **changes: Any,
) -> Framework:
    """A fitted framework with its configuration attached, as a run would make it."""
    torch.manual_seed(seed)
    plain = config(framework, head, vlm, **changes)
    built = build_framework(OmegaConf.create(plain), SPEC, robots)
    built.normalizer.fit(statistics() if robots is None else [statistics(robot) for robot in robots])
    if built.head.needs_fit:
        built.head.fit(torch.randn(64, built.horizon, built.action_width))
    if hasattr(built.head, "teach"):
        built.learn_from(build(framework, "flow_matching", vlm, seed=seed, **changes))
        with torch.no_grad():
            for parameter in built.parameters():
                if parameter.requires_grad:  # a student that is no copy of its teacher any more
                    parameter.add_(0.1 * torch.randn_like(parameter))
    built.attach_run(config=plain, provenance={"root": "test", "renderer": "test-renderer"})
    return built


def batch(size: int = 4, *, seed: int = 0, obs_steps: int = 1, horizon: int = HORIZON) -> Batch:
    """Random pictures and numbers; the last sample's last two steps lie past its episode's end."""
    draw = torch.Generator().manual_seed(seed)
    images = {
        camera.name: torch.randint(
            0, 256, (size, obs_steps, 3, camera.height, camera.width), generator=draw, dtype=torch.uint8
        )
        for camera in SPEC.cameras
    }
    mask = torch.ones(size, horizon, dtype=torch.bool)
    mask[-1, -2:] = False
    return Batch(
        observation=Observation(
            images=images,
            image_mask={name: torch.ones(size, dtype=torch.bool) for name in images},
            state=torch.randn(size, obs_steps, SPEC.state_dim, generator=draw),
            prompt=(PROMPTS * size)[:size],
        ),
        actions=torch.randn(size, horizon, SPEC.action_dim, generator=draw),
        action_mask=mask,
    )


def mixed_batch() -> Batch:
    """Two samples of `SPEC` and two of `NARROW`, whose missing camera and dimensions are zeros."""
    data = batch()
    narrow = torch.tensor([False, True, False, True])
    observation = data.observation
    observation.embodiment = narrow.long()
    observation.image_mask["wrist"] = ~narrow
    observation.images["wrist"][narrow] = 0
    observation.state[narrow, :, NARROW.state_dim :] = 0
    data.actions[narrow, :, NARROW.action_dim :] = 0
    return data


def fixed_loss(framework: Framework, data: Batch, seed: int = 0) -> torch.Tensor:
    """The loss with all of its random numbers fixed."""
    torch.manual_seed(seed)
    return framework.compute_loss(data)[0]
