"""Octo's tokens: what the task and each observation step become before the transformer (Octo Model Team 2024,
section III-A; code octo `tokenizers.py`, `octo_module.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from librobot.nn.instructions import InstructionEncoder
from librobot.nn.small_stem import SmallStem
from librobot.types import Observation


@dataclass
class Tokens:
    """What the transformer reads: the task, then what was seen and the readouts of every step."""

    task: Float[Tensor, "b p d"]
    task_real: Bool[Tensor, "b p"]
    seen: Float[Tensor, "b t n d"]
    seen_real: Bool[Tensor, "b t n"]
    readouts: Float[Tensor, "b t r d"]


@dataclass
class Kept:
    """Which modalities each sample may use: the instruction, the goal pictures, each camera."""

    language: Bool[Tensor, " b"]
    goal: Bool[Tensor, " b"]
    cameras: dict[str, Bool[Tensor, " b"]]

    @classmethod
    def of(cls, observation: Observation) -> Kept:
        """All that the observation has: an empty instruction and an all-black goal are none."""
        device = observation.state.device
        language = torch.tensor([bool(prompt.strip()) for prompt in observation.prompt], device=device)
        goal = torch.zeros_like(language)
        for picture in (observation.goal_images or {}).values():
            goal = goal | picture.flatten(1).ne(0).any(dim=1)
        return cls(language, goal, dict(observation.image_mask))

    def thinned(self, keep_goal: float, camera_dropout: float) -> Kept:
        """With modalities hidden at random (octo `task_augmentation.py`, `obs_transforms.py`).

        Where a sample has both, either the goal (with probability `keep_goal`) or the instruction stays.
        Each camera is hidden with probability `camera_dropout`, but never a sample's last one.
        """
        device = self.language.device
        draw = torch.rand(len(self.language), device=device) < keep_goal
        goal = self.goal & (draw | ~self.language)
        language = self.language & ~goal
        if not camera_dropout:
            return Kept(language, goal, self.cameras)
        present = torch.stack(list(self.cameras.values()), dim=1)
        lots = torch.rand(present.shape, device=device)
        spared = lots.masked_fill(~present, -1.0).argmax(dim=1, keepdim=True)
        hidden = torch.rand(present.shape, device=device) < camera_dropout
        present = present & ~hidden.scatter(1, spared, False)
        return Kept(language, goal, dict(zip(self.cameras, present.unbind(1), strict=True)))


class CameraTokens(nn.Module):
    """One camera's pictures of every step, the goal stacked behind, as tokens with learned positions."""

    def __init__(
        self, stem: SmallStem, size: int, *, stem_width: int, width: int, max_steps: int, goal: bool
    ) -> None:
        super().__init__()
        self.stem, self.size, self.goal = stem, size, goal
        self.num_tokens = stem.num_tokens(size)
        self.proj = nn.Linear(stem_width, width)
        self.positions = learned_positions(max_steps, self.num_tokens, width)

    def forward(
        self,
        pictures: UInt8[Tensor, "b t c h w"] | Float[Tensor, "b t c h w"],
        goal: UInt8[Tensor, "b c h w"] | None,
        keep_goal: Bool[Tensor, " b"],
    ) -> Float[Tensor, "b t n d"]:
        b, t = pictures.shape[:2]
        pixels = self.resized(rearrange(pictures, "b t c h w -> (b t) c h w"))
        if self.goal:
            wanted = torch.zeros_like(pixels)
            if goal is not None:
                # A goal that is absent or hidden is black, as a missing one is in octo.
                wanted = self.resized(goal) * keep_goal[:, None, None, None]
                wanted = repeat(wanted, "b c h w -> (b t) c h w", t=t)
            pixels = torch.cat((pixels, wanted), dim=1)
        tokens = self.proj(self.stem((pixels / 127.5 - 1.0).to(self.proj.weight.dtype)))
        return rearrange(tokens, "(b t) n d -> b t n d", b=b) + self.positions[:t]

    def resized(self, pictures: Tensor) -> Float[Tensor, "m c h w"]:
        """In [0, 255]; the aspect ratio is not kept, as in octo."""
        pixels = pictures.float() * (255.0 if pictures.is_floating_point() else 1.0)
        if pixels.shape[-2:] == (self.size, self.size):
            return pixels
        return functional.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)


class StateTokens(nn.Module):
    """One token per state dimension: its bin between quantiles of the standard normal (octo
    `LowdimObsTokenizer` with `bin_type="normal"`; values beyond the outer bins take those)."""

    edges: Tensor

    def __init__(self, num_dims: int, num_bins: int, width: int, max_steps: int) -> None:
        super().__init__()
        if num_bins < 2:
            raise ValueError(f"num_state_bins must be at least 2, found {num_bins}")
        inner = torch.linspace(1e-6, 1 - 1e-6, num_bins + 1, dtype=torch.float64)[1:-1]
        self.register_buffer("edges", torch.special.ndtri(inner).float(), persistent=False)
        self.embedding = nn.Embedding(num_bins, width)
        # As octo's dense layer over one-hot bins begins. In embeddings of unit size the positions, which say
        # what dimension a token is of, would be lost, and neighbouring bins stay as unlike as any two.
        nn.init.normal_(self.embedding.weight, std=num_bins**-0.5)
        self.positions = learned_positions(max_steps, num_dims, width)

    def forward(self, state: Float[Tensor, "b t s"]) -> Float[Tensor, "b t s d"]:
        bins = torch.bucketize(state.float().contiguous(), self.edges.float(), right=True)
        return self.embedding(bins) + self.positions[: state.shape[1]]


class OctoTokens(nn.Module):
    """All tokens of an observation. Every camera has a stem of its own."""

    def __init__(
        self,
        *,
        text: InstructionEncoder,
        cameras: Sequence[CameraTokens],
        state: StateTokens | None,
        width: int,
        max_steps: int,
        num_readouts: int,
        repeat_task: bool,
    ) -> None:
        super().__init__()
        self.text = text
        self.text_proj = nn.Linear(text.width, width)
        self.text_positions = nn.Parameter(0.02 * torch.randn(text.num_tokens, width))
        self.cameras = nn.ModuleList(cameras)
        self.state = state
        self.readouts = learned_positions(max_steps, num_readouts, width)
        self.repeat_task = repeat_task

    def forward(
        self,
        observation: Observation,
        state: Float[Tensor, "b t s"],
        state_real: Bool[Tensor, "b s"],
        kept: Kept,
    ) -> Tokens:
        """`observation` with its cameras in the robot's order, `state` normalised."""
        assert observation.inputs is not None
        b, t = state.shape[:2]
        hidden, real = self.text(observation.inputs)
        task = self.text_proj(hidden.to(self.text_proj.weight.dtype)) + self.text_positions
        task_real = real & kept.language[:, None]
        goals = observation.goal_images or {}
        seen, seen_real = [], []
        for camera, (name, pictures) in zip(self.cameras, observation.images.items(), strict=True):
            tokens = camera(pictures, goals.get(name), kept.goal)
            seen.append(tokens)
            seen_real.append(repeat(kept.cameras[name], "b -> b t n", t=t, n=tokens.shape[2]))
        if self.state is not None:
            seen.append(self.state(state))
            seen_real.append(repeat(state_real, "b s -> b t s", t=t))
        if self.repeat_task:
            seen.append(repeat(task, "b p d -> b t p d", t=t))
            seen_real.append(repeat(task_real, "b p -> b t p", t=t))
        return Tokens(
            task,
            task_real,
            torch.cat(seen, dim=2),
            torch.cat(seen_real, dim=2),
            repeat(self.readouts[:t], "t r d -> b t r d", b=b),
        )


class BackboneTokens(nn.Module):
    """The hidden states of a `vlm=` in place of language and stems: all of them are task tokens, which every
    step reads."""

    def __init__(
        self, hidden_size: int, state: StateTokens | None, *, width: int, max_steps: int, num_readouts: int
    ) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size, width)
        self.state = state
        self.readouts = learned_positions(max_steps, num_readouts, width)

    def forward(
        self,
        hidden: Float[Tensor, "b l e"],
        real: Bool[Tensor, "b l"],
        state: Float[Tensor, "b t s"],
        state_real: Bool[Tensor, "b s"],
    ) -> Tokens:
        b, t = state.shape[:2]
        task = self.proj(hidden.to(self.proj.weight.dtype))
        readouts = repeat(self.readouts[:t], "t r d -> b t r d", b=b)
        if self.state is None:
            return Tokens(task, real, readouts[:, :, :0], real.new_ones(b, t, 0), readouts)
        seen_real = repeat(state_real, "b s -> b t s", t=t)
        return Tokens(task, real, self.state(state), seen_real, readouts)


def learned_positions(max_steps: int, num_tokens: int, width: int) -> nn.Parameter:
    """One vector for every token of every step."""
    return nn.Parameter(0.02 * torch.randn(max_steps, num_tokens, width))
