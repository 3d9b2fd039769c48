"""A trained policy as numpy in, numpy out: the one path that evaluation, serving and robots use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from librobot.errors import LibrobotError, nearest
from librobot.frameworks.base import Framework
from librobot.nn.pretrained import skip_pretrained
from librobot.types import Observation, RobotSpec


class Policy:
    """A framework in evaluation mode.

    An observation is `{"images": {camera: uint8 (h, w, 3)}, "state": (s,), "prompt": text}`, in the sizes
    and physical units of `spec`; with `obs_steps` > 1 images are (t, h, w, 3) and the state is (t, s),
    oldest first. Cameras that the policy does not use are ignored. An integer under "seed" fixes the noise
    of a stochastic policy for that observation, whatever else is in the batch. `num_steps` and `guidance`
    are those of the action head's sampler; None leaves them as they were trained.
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
    def from_checkpoint(cls, path: str | Path, device: torch.device | str | None = None) -> Policy:
        """Rebuild the policy from what the checkpoint holds; nothing else is needed.

        `device` None takes a CUDA device where there is one. Raises LibrobotError for a file that is not a
        librobot checkpoint, and for weights that do not fit the configuration stored with them.
        """
        from librobot.config.build import build_framework  # here: a policy built in Python needs no Hydra

        checkpoint = read_checkpoint(path)
        run = checkpoint["librobot"]
        from omegaconf import OmegaConf

        config = OmegaConf.create(run["config"])
        with skip_pretrained(run.get("backbone")):
            framework = build_framework(config, RobotSpec.from_dict(run["spec"]))
        framework.on_load_checkpoint(checkpoint)
        framework.load_weights(checkpoint["state_dict"])
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(framework, config=run["config"], provenance=run["provenance"], device=device)

    @property
    def spec(self) -> RobotSpec:
        return self.framework.spec

    @property
    def horizon(self) -> int:
        """Actions in a chunk."""
        return self.framework.horizon

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
        checked = [self._check(observation) for observation in observations]
        with torch.inference_mode():
            actions = self._sample(self._collate(checked), self._noise(observations))
        return [{"actions": chunk} for chunk in actions.float().cpu().numpy()]

    def _sample(self, observation: Observation, noise: torch.Tensor | None) -> torch.Tensor:
        try:
            return self.framework.sample_actions(
                observation, noise=noise, num_steps=self.num_steps, guidance=self.guidance
            )
        except ValueError as error:  # the head's, about what its sampler can do
            if self.num_steps is None and self.guidance is None:
                raise
            raise LibrobotError(f"head {type(self.framework.head).__name__}: {error}") from error

    def _collate(self, checked: Sequence[Mapping[str, Any]]) -> Observation:
        images = {
            name: torch.from_numpy(np.stack([o["images"][name] for o in checked])).permute(0, 1, 4, 2, 3)
            for name in self.spec.camera_names
        }
        present = torch.ones(len(checked), dtype=torch.bool)
        return Observation(
            images=images,
            image_mask=dict.fromkeys(images, present),
            state=torch.from_numpy(np.stack([o["state"] for o in checked])),
            prompt=[o["prompt"] for o in checked],
        ).to(self.device)

    def _noise(self, observations: Sequence[Mapping[str, Any]]) -> torch.Tensor | None:
        seeds = [observation.get("seed") for observation in observations]
        if not self.framework.head.stochastic or all(seed is None for seed in seeds):
            return None
        shape = (self.horizon, self.framework.action_width)
        draws = [
            torch.randn(shape)
            if seed is None
            else torch.randn(shape, generator=torch.Generator().manual_seed(int(seed)))
            for seed in seeds
        ]
        return torch.stack(draws).to(self.device, self.framework.compute_dtype)

    def _check(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The observation with a time axis everywhere, or LibrobotError with what is wrong with it."""
        for key in ("images", "state", "prompt"):
            if key not in observation:
                raise LibrobotError(f"the observation lacks {key!r}; it has {sorted(observation)}")
        prompt = observation["prompt"]
        if not isinstance(prompt, str):
            raise LibrobotError(f"the observation's prompt must be text, found {type(prompt).__name__}")
        if self.framework.processor is not None and not prompt.strip():
            raise LibrobotError(
                "the observation's prompt is empty; give the instruction, such as 'reach the red cube'"
            )
        images = {name: self._check_image(observation["images"], name) for name in self.spec.camera_names}
        return {"images": images, "state": self._check_state(observation["state"]), "prompt": prompt}

    def _check_image(self, images: Mapping[str, Any], name: str) -> np.ndarray:
        if name not in images:
            raise LibrobotError(
                f"the observation lacks camera {name!r} of robot {self.spec.name!r}; {nearest(name, images)}"
            )
        image = np.asarray(images[name])
        camera = next(camera for camera in self.spec.cameras if camera.name == name)
        if image.dtype != np.uint8:
            raise LibrobotError(
                f"camera {name!r}: images are uint8 in [0, 255], found {image.dtype}; multiply floats in "
                f"[0, 1] by 255 and convert"
            )
        expected = (self.obs_steps, camera.height, camera.width, 3)
        if self.obs_steps == 1 and image.ndim == 3:
            image = image[None]
        if image.shape != expected:
            wanted = expected[1:] if self.obs_steps == 1 else expected
            found = image.shape[1:] if self.obs_steps == 1 and image.ndim == 4 else image.shape
            hint = "; put channels last" if image.ndim >= 3 and image.shape[-3] == 3 else ""
            raise LibrobotError(f"camera {name!r}: images must have shape {wanted}, found {found}{hint}")
        return image

    def _check_state(self, value: Any) -> np.ndarray:
        state = np.asarray(value, dtype=np.float32)
        if self.obs_steps == 1 and state.ndim == 1:
            state = state[None]
        expected = (self.obs_steps, self.spec.state_dim)
        if state.shape != expected:
            names = ", ".join(dim.name for dim in self.spec.state)
            wanted = expected[1:] if self.obs_steps == 1 else expected
            raise LibrobotError(
                f"the state must have shape {wanted} ({names}), found {np.asarray(value).shape}"
            )
        if not np.isfinite(state).all():
            raise LibrobotError(f"the state must be finite, found {state[~np.isfinite(state)][0]}")
        return state


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU. Raises LibrobotError where it is missing or not one of ours."""
    path = Path(path)
    if not path.is_file():
        raise LibrobotError(
            f"no checkpoint at {path}; give the path of a .ckpt file that librobot-train wrote"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
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
