"""A trained policy as numpy in, numpy out: the one path that evaluation, serving and robots use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from librobot.checkpoint_path import checkpoint_file
from librobot.errors import LibrobotError
from librobot.frameworks.base import Framework
from librobot.frameworks.checkpoint import acting_weights
from librobot.frameworks.sharded_files import read_whole
from librobot.nn.pretrained import skip_pretrained
from librobot.requests import check_observation, which_robot
from librobot.types import Observation, RobotSpec


class Policy:
    """A framework in evaluation mode.

    An observation is `{"images": {camera: uint8 (h, w, 3)}, "state": (s,), "prompt": text}`, in the sizes
    and physical units of `spec`; with `obs_steps` > 1 images are (t, h, w, 3) and the state is (t, s),
    oldest first. Cameras that the policy does not use are ignored; None for one that it does use hides it. A
    policy for several robots wants the robot's name under "robot"; one that reads goals takes their pictures
    under "goal_images" ({camera: uint8 (h, w, 3)}), with an instruction or in its place. An integer under
    "seed" fixes the noise of a stochastic policy for that observation, whatever else is in the batch.
    `num_steps` and `guidance` are those of the action head's sampler; None leaves them as they were trained.
    """

    num_steps: int | None = None
    guidance: float | None = None

    def __init__(
        self,
        framework: Framework,
        *,
        config: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.device = torch.device(device) if device is not None else framework.device
        self.framework = framework.to(self.device).eval().requires_grad_(False)
        self.config = dict(config or {})
        self.provenance = dict(provenance or {})

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        *,
        weights: Literal["average", "trained"] | None = None,
    ) -> Policy:
        """Rebuild the policy from what the checkpoint (or a run directory's last one) holds; nothing else is
        needed.

        `device` None takes a CUDA device where there is one. `weights` chooses between the trained weights
        and their moving average, where the run kept one (callbacks=[default,ema]); None takes what the run
        says. Raises LibrobotError for a file that is not a librobot checkpoint, and for weights that do not
        fit the configuration stored with them.
        """
        from librobot.config.build import build_framework  # here: a policy built in Python needs no Hydra

        checkpoint = read_checkpoint(path)
        run = checkpoint["librobot"]
        from omegaconf import OmegaConf

        config = OmegaConf.create(run["config"])
        with skip_pretrained(run.get("backbone")):
            robots = [RobotSpec.from_dict(robot) for robot in run.get("embodiments", ())]
            framework = build_framework(
                config, RobotSpec.from_dict(run["spec"]), robots if len(robots) > 1 else None
            )
        framework.on_load_checkpoint(checkpoint)
        framework.load_weights(acting_weights(checkpoint, weights))
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(framework, config=run["config"], provenance=run["provenance"], device=device)

    @property
    def spec(self) -> RobotSpec:
        """The robot's own, whatever the framework's view of its actions."""
        return self.framework.robots.own_union

    @property
    def horizon(self) -> int:
        """Actions in a chunk."""
        return self.framework.num_future_actions

    @property
    def obs_steps(self) -> int:
        """Observation steps that the policy sees."""
        return self.framework.obs_steps

    @property
    def renderer(self) -> str | None:
        """What rendered the training pictures, where they were simulated."""
        return self.provenance.get("renderer")

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Float[np.ndarray, "k a"]]:
        """`{"actions": float32 (k, a)}` in physical units. Raises LibrobotError for a wrong observation."""
        return self.infer_batch([observation])[0]

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, np.ndarray]]:
        """`infer` for many observations in one pass of the network."""
        if not observations:
            return []
        robots = self.framework.embodiments
        numbers = [which_robot(observation, robots) for observation in observations]
        checked = [
            check_observation(
                observation,
                robots[number],
                self.obs_steps,
                needs_prompt=self.framework.processor is not None,
                masks_cameras=self.framework.masks_cameras,
                reads_goals=self.framework.reads_goals,
            )
            for observation, number in zip(observations, numbers, strict=True)
        ]
        with torch.inference_mode():
            given = self._collate(checked, numbers)
            actions = self._sample(given, self._noise(observations)).float().cpu()
            seen = self.framework.robots.representation
            if seen is not None:
                robots = seen.robots
                actions = seen.decode(actions, given.state[:, -1].float().cpu(), torch.tensor(numbers))
        return [
            {"actions": chunk[:, : robots[number].action_dim]}
            for chunk, number in zip(actions.numpy(), numbers, strict=True)
        ]

    def _sample(self, observation: Observation, noise: torch.Tensor | None) -> torch.Tensor:
        try:
            return self.framework.sample_actions(
                observation, noise=noise, num_steps=self.num_steps, guidance=self.guidance
            )
        except ValueError as error:  # the head's, about what its sampler can do
            if self.num_steps is None and self.guidance is None:
                raise
            raise LibrobotError(f"head {type(self.framework.head).__name__}: {error}") from error

    def _collate(self, checked: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> Observation:
        """A batch, with zeros for the cameras and dimensions that a robot or an observation lacks."""
        images, image_mask = {}, {}
        for camera in self.spec.cameras:
            blank = np.zeros((self.obs_steps, camera.height, camera.width, 3), np.uint8)
            pictures = [o["images"].get(camera.name) for o in checked]
            stacked = np.stack([blank if picture is None else picture for picture in pictures])
            images[camera.name] = torch.from_numpy(stacked).permute(0, 1, 4, 2, 3)
            image_mask[camera.name] = torch.tensor([picture is not None for picture in pictures])
        width = self.spec.state_dim
        states = [np.pad(o["state"], ((0, 0), (0, width - o["state"].shape[1]))) for o in checked]
        goals = {}
        for camera in self.spec.cameras:
            black = np.zeros((camera.height, camera.width, 3), np.uint8)
            wanted = [o["goal_images"].get(camera.name) for o in checked]
            if any(goal is not None for goal in wanted):
                held = np.stack([black if goal is None else goal for goal in wanted])
                goals[camera.name] = torch.from_numpy(held).permute(0, 3, 1, 2)
        return Observation(
            images=images,
            image_mask=image_mask,
            state=torch.from_numpy(np.stack(states)),
            prompt=[o["prompt"] for o in checked],
            embodiment=torch.tensor(numbers) if len(self.framework.embodiments) > 1 else None,
            goal_images=goals or None,
        ).to(self.device)

    def _noise(self, observations: Sequence[Mapping[str, Any]]) -> torch.Tensor | None:
        seeds = [observation.get("seed") for observation in observations]
        if not self.framework.head.stochastic or all(seed is None for seed in seeds):
            return None
        shape = (self.framework.horizon, self.framework.action_width)
        draws = [
            torch.randn(shape)
            if seed is None
            else torch.randn(shape, generator=torch.Generator().manual_seed(int(seed)))
            for seed in seeds
        ]
        return torch.stack(draws).to(self.device, self.framework.compute_dtype)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU; of a run directory its last. Raises LibrobotError where there is
    none, or not one of ours."""
    path = checkpoint_file(path)
    try:
        checkpoint = (
            read_whole(path) if path.is_dir() else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:
        raise LibrobotError(f"{path}: not a readable checkpoint ({error})") from error
    if not isinstance(checkpoint, dict) or not {"librobot", "state_dict"} <= set(checkpoint):
        raise LibrobotError(
            f"{path}: not a checkpoint of librobot (it lacks the keys 'librobot' and 'state_dict')"
        )
    if not checkpoint["librobot"]["config"]:
        raise LibrobotError(
            f"{path}: the checkpoint holds no configuration; it was saved outside librobot-train"
        )
    return checkpoint
