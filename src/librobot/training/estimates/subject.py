"""The policy and the batch that a configuration describes, without weights and without a dataset's frames."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils._python_dispatch import _disable_current_modes

from librobot.config.build import build, build_datamodule, build_framework, build_suite, robots_of
from librobot.config.compose import resolve
from librobot.errors import LibrobotError
from librobot.frameworks.base import Framework
from librobot.nn.pretrained import skip_pretrained
from librobot.training.estimates.weightless import Weightless
from librobot.types import Batch, Camera, Observation, RobotSpec

PROMPT = "put the blue cube on the green disc"
CHARACTERS_PER_TOKEN = 4  # of English, in the subword vocabularies of the published backbones
FITTED_CHUNKS = 64


def offline(cfg: DictConfig) -> DictConfig:
    """A copy that downloads nothing and compiles nothing: the sizes of published weights are the YAML's."""
    made = OmegaConf.create(resolve(cfg))
    for part in ("vlm", "framework", "head"):
        strip(made.get(part))
    return made


def strip(node: Any) -> None:
    if not isinstance(node, DictConfig):
        return
    for key, value in list(node.items()):
        name = str(key)
        if isinstance(value, DictConfig):
            strip(value)
        elif name.endswith("pretrained") or (name == "compile" and isinstance(value, bool)):
            node[name] = False
        elif name in ("compile", "teacher"):
            node[name] = None
        elif name == "num_train_steps" and "tokenizers" in str(node.get("_target_")):
            node[name] = 1  # tokens of any kind will do


def robot_of(cfg: DictConfig) -> tuple[RobotSpec, Sequence[RobotSpec] | None, str]:
    """The robot, the robots of a mixture of several, and an instruction: of the named robot, of a simulated
    suite, or else of the dataset's own description."""
    data = cfg.data
    suite = (data.get("source") or {}).get("suite")
    if cfg.get("robot"):
        return sized(build(cfg.robot, "robot"), data), None, PROMPT
    if suite:
        return sized(build_suite(suite).spec, data), None, PROMPT
    quiet = OmegaConf.merge(cfg, {"data": {"cache": "none"}})
    try:
        source = build_datamodule(quiet).source  # type: ignore[arg-type]
    except (LibrobotError, OSError) as error:
        raise LibrobotError(
            f"the estimate reads cameras, state and action from the dataset, which does not open: {error}; "
            f"name the robot instead: robot=OPTION"
        ) from error
    rows = np.linspace(0, int(source.episode_lengths.sum()) - 1, 64).astype(np.int64)
    prompts = source.prompts(np.unique(rows))
    return source.spec, robots_of(source), max(prompts, key=len)


def sized(spec: RobotSpec, data: DictConfig) -> RobotSpec:
    """With the cameras and picture sizes that the data are read with."""
    if data.get("cameras"):
        spec = spec.with_cameras(list(data.cameras))
    if data.get("image_size"):
        height, width = (int(side) for side in data.image_size)
        spec = replace(spec, cameras=tuple(Camera(c.name, height, width) for c in spec.cameras))
    return spec


def make_policy(
    cfg: DictConfig, mode: Weightless, spec: RobotSpec, robots: Sequence[RobotSpec] | None
) -> Framework:
    """The policy of an `offline` configuration: fake parameters, statistics that change nothing."""
    with skip_pretrained(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights and prompts that are not those of the run
        framework = build_framework(cfg, spec, robots)
    mode.strip(framework)
    known = [unit_statistics(robot) for robot in framework.embodiments]
    framework.normalizer.fit(known if robots is not None else known[0])
    if framework.head.needs_fit:
        chunks = framework.normalized_chunks(smooth(framework.spec, framework.horizon))
        with _disable_current_modes():  # what is fitted is small, and real
            framework.head.fit(chunks)
    if hasattr(framework.head, "teach"):
        raise LibrobotError(
            f"head {type(framework.head).__name__} also runs its teacher, which an estimate cannot build; "
            f"estimate the same policy with head=flow_matching, and add the teacher's weights"
        )
    return framework.train()


def make_batch(
    framework: Framework, mode: Weightless, spec: RobotSpec, size: int, prompt: str, *, bytes_for_words: bool
) -> Batch:
    """A batch of the robot `spec`. `bytes_for_words` shortens the instruction to a byte for each token that a
    subword vocabulary would make of it, because the policy has a tokenizer of bytes in its place."""
    steps, horizon = framework.obs_steps, framework.horizon
    if bytes_for_words:
        prompt = prompt[: max(1, math.ceil(len(prompt) / CHARACTERS_PER_TOKEN))]
    with mode.fakes:
        images = {
            c.name: torch.empty((size, steps, 3, c.height, c.width), dtype=torch.uint8) for c in spec.cameras
        }
        goals = {c.name: torch.empty((size, 3, c.height, c.width), dtype=torch.uint8) for c in spec.cameras}
    state = torch.zeros(size, steps, spec.state_dim)
    present = dict.fromkeys(images, torch.ones(size, dtype=torch.bool))
    prompts = [prompt] * size
    processor = framework.processor
    return Batch(
        observation=Observation(
            images=images,
            image_mask=present,
            state=state,
            prompt=prompts,
            inputs=None if processor is None else processor(prompts, images, state),
            embodiment=torch.zeros(size, dtype=torch.long) if len(framework.embodiments) > 1 else None,
            goal_images=goals if framework.wants_goals else None,
        ),
        actions=smooth(spec, horizon, size),
        action_mask=torch.ones(size, horizon, dtype=torch.bool),
        extra={"rows": np.zeros(size, np.int64), "progress": torch.zeros(size, horizon)},
    )


def smooth(spec: RobotSpec, horizon: int, count: int = FITTED_CHUNKS) -> torch.Tensor:
    """Chunks that move slowly, as demonstrations do: what tokenizers make of them is of a usual length."""
    draw = torch.Generator().manual_seed(0)
    phase, speed = (torch.rand(count, 1, spec.action_dim, generator=draw) for _ in range(2))
    time = torch.linspace(0, 1, horizon)[None, :, None]
    return 0.8 * torch.sin(6.3 * phase + 3 * speed * time)


def unit_statistics(spec: RobotSpec) -> dict[str, dict[str, np.ndarray]]:
    made = {}
    for key, dim in (("state", spec.state_dim), ("action", spec.action_dim)):
        zeros, ones = np.zeros(dim), np.ones(dim)
        made[key] = {"mean": zeros, "std": ones, "min": -ones, "max": ones, "q01": -ones, "q99": ones}
    return made
