"""pi0: a vision-language-action flow model (Black et al. 2024, arXiv 2410.24164; openpi `models/pi0.py`).

    prefix    images and instruction, attending to each other: the backbone, whose layers keep keys and values
    suffix    one state token, then one token per action; each attends to all earlier blocks and to its own

The action expert is a second, narrower transformer with the backbone's number of layers and heads. In layer
i its tokens attend to the backbone's keys and values of layer i beside their own; prefix tokens never see
them, and the state token never sees the actions, so both run once for all sampling steps. A backbone without
a cache (an encoder-decoder) gives hidden states, from which learned projections make keys and values for each
of the expert's layers.

The backbone is whatever `vlm=` names; PaliGemma is the paper's. `head=` is flow matching in the paper; any
other fits. A deterministic head has no noisy actions to embed: every action token then starts from one
learned vector and is told apart by its position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from librobot.frameworks.action_expert import ActionExpert, Place
from librobot.frameworks.base import Framework, OptimizerFactory, SchedulerFactory
from librobot.frameworks.prompts import CleanedPrompt
from librobot.heads.base import ActionHead
from librobot.losses import reduce
from librobot.nn.learned_cache import LearnedCache
from librobot.nn.pictures import resize_with_pad
from librobot.nn.pooling import situation
from librobot.nn.positions import time_embedding
from librobot.normalize import NormalizationMode
from librobot.types import Batch, Observation, RobotSpec
from librobot.vlms.base import VLM, Context, PromptWriter


@dataclass
class Condition:
    """What the denoiser needs beside the noisy actions: the backbone's cache, and the normalised state.

    `place` is where the action tokens stand behind both, made beforehand by `locate` where the same condition
    is read many times.
    """

    prefix: Context
    state: Float[Tensor, "b t s"]
    place: Place | None = None
    locate: Callable[[Condition], Place] | None = None

    @property
    def features(self) -> Float[Tensor, "b f"]:
        """What tells situations apart, for a coupling of noise and actions."""
        return situation(self.prefix.hidden, self.prefix.mask, self.state)

    def dropped(self, rows: Bool[Tensor, " b"]) -> Condition:
        """Without pictures and instruction in those samples; the state stays."""
        return self.changed(replace(self.prefix, mask=self.prefix.mask & ~rows[:, None]))

    def detach(self) -> Condition:
        """The same numbers, through which no gradient reaches the backbone."""
        keys, values = (tuple(x.detach() for x in cache) for cache in (self.prefix.keys, self.prefix.values))
        return self.changed(replace(self.prefix, keys=keys, values=values))

    def changed(self, prefix: Context) -> Condition:
        bare = replace(self, prefix=prefix, place=None)
        return bare if self.locate is None else replace(bare, place=self.locate(bare))


class Pi0(Framework):
    answers_questions: bool = False  # the language model also learns to answer, see `pi05`
    denoiser_parts: ClassVar[tuple[str, ...]] = (
        "expert", "state_proj", "action_in_proj", "action_mlp_in", "time_mlp_in", "action_time_mlp_out",
        "action_out_proj",
    )  # fmt: skip

    block_lists = ("expert.layers",)

    def __init__(
        self,
        *,
        spec: RobotSpec,
        vlm: VLM,
        head: ActionHead,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        horizon: int = 50,
        obs_steps: int = 1,
        normalization: Mapping[str, NormalizationMode],
        freeze: Sequence[str] = (),
        lr_multipliers: Mapping[str, float] | None = None,
        max_state_dim: int | None = 32,
        max_action_dim: int | None = 32,
        expert_width: int | None = None,
        expert_mlp_ratio: int = 4,
        picture_size: Sequence[int] | None = None,
        compile: str | None = None,
        embodiments: Sequence[RobotSpec] | None = None,
    ) -> None:
        for name, value, needed in (
            ("max_state_dim", max_state_dim, spec.state_dim),
            ("max_action_dim", max_action_dim, spec.action_dim),
        ):
            if value is not None and value < needed:
                raise ValueError(f"{name} must be at least {needed} for robot {spec.name!r}, found {value}")
        if picture_size is not None and (len(picture_size) != 2 or min(picture_size) < 1):
            raise ValueError(f"picture_size must be [height, width] in pixels, found {list(picture_size)}")
        super().__init__(
            spec=spec,
            vlm=vlm,
            head=head,
            optimizer=optimizer,
            scheduler=scheduler,
            horizon=horizon,
            obs_steps=obs_steps,
            normalization=normalization,
            freeze=freeze,
            lr_multipliers=lr_multipliers,
            action_width=max_action_dim,
            embodiments=embodiments,
        )
        self.state_width = spec.state_dim if max_state_dim is None else max_state_dim
        self.picture_size = None if picture_size is None else (picture_size[0], picture_size[1])
        self.width = vlm.hidden_size // 2 if expert_width is None else expert_width
        self.learned_cache = None
        if not vlm.has_cache:
            self.learned_cache = LearnedCache(
                vlm.hidden_size,
                num_layers=vlm.geometry.num_layers,
                num_kv_heads=vlm.geometry.num_kv_heads,
                head_dim=vlm.geometry.head_dim,
                rope_theta=vlm.geometry.rope_theta,
            )
        self.make_expert(expert_mlp_ratio * self.width)
        if compile is not None:
            self.expert.compile_as(compile)
        self.action_out_proj = nn.Linear(self.width, head.output_width)
        # Only a cache's keys and values are read, so what lies behind the last layer's cannot train, unless
        # the backbone writes tokens.
        writes = head.network == "pair" or self.answers_questions
        self.splits_heads = vlm.has_cache
        needs_state = not vlm.has_cache or head.network == "pair"
        self.prefix_layers: tuple[int, ...] = (-1,) if needs_state else ()
        self.freeze_unused(layers=(-1,) if writes else self.prefix_layers, logits=writes)
        self.apply_freeze()

    def make_expert(self, mlp_width: int) -> None:
        """The expert, and what makes its tokens."""
        assert self.vlm is not None
        self.expert = ActionExpert(self.width, mlp_width, self.vlm.geometry)
        self.state_proj = nn.Linear(self.state_width, self.width) if self.state_width else None
        if self.head.generative:
            self.action_in_proj = nn.Linear(self.action_width, self.width)
            # Of [action, time] the time is the same for a whole chunk: its half of the product is made once.
            self.action_mlp_in = nn.Linear(self.width, self.width)
            self.time_mlp_in = nn.Linear(self.width, self.width, bias=False)
            with torch.no_grad():  # as one layer of twice the inputs starts
                for half in (self.action_mlp_in, self.time_mlp_in):
                    half.weight.mul_(0.5**0.5)
            self.action_time_mlp_out = nn.Linear(self.width, self.width)
        else:
            self.action_token = nn.Parameter(torch.randn(self.width))

    def compute_loss(
        self, batch: Batch, *, noise: Tensor | None = None, time: Tensor | None = None
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        actions = self.pad(self.normalized_actions(batch), self.action_width)
        # Padded dimensions are noised and denoised as in openpi, but their error does not count.
        mask = functional.pad(self.real_actions(batch), (0, self.action_width - self.spec.action_dim))
        condition = self.condition(batch.observation)
        per_sample = self.head.loss(self.network, condition, actions, mask, noise=noise, time=time)
        return reduce(per_sample, batch.action_mask), {}

    def sample_actions(
        self,
        observation: Observation,
        *,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
    ) -> Float[Tensor, "b k a"]:
        condition = self.condition(observation)
        condition = replace(condition, place=self.locate(condition), locate=self.locate)
        shape = (observation.batch_size, self.horizon, self.action_width)
        actions = self.head.sample(
            self.network, condition, shape, noise=noise, num_steps=num_steps, guidance=guidance
        )
        return self.physical_actions(actions[..., : self.spec.action_dim], observation)

    @property
    def network(self) -> Any:
        """What the head is given."""
        return self.denoise

    def condition(self, observation: Observation) -> Condition:
        """Run the prefix once; `denoise` then reads its cache at every step."""
        observation = self.resized(self.prepare(self.completed(observation)))
        assert self.vlm is not None
        state = self.pad(self.normalized_state(observation), self.state_width)
        prefix = self.vlm(observation, layers=self.prefix_layers)
        if self.learned_cache is not None:
            keys, values = self.learned_cache(prefix.hidden, prefix.mask)
            prefix = replace(prefix, keys=keys, values=values)
        return Condition(prefix, state)

    def locate(self, condition: Condition) -> Place:
        """Where the action tokens stand: behind the prefix and the state, whatever the noise and the time."""
        before = condition.prefix
        if self.state_proj is not None:
            before = self.expert.extend(before, self.state_proj(condition.state))
        return self.expert.place(before, self.horizon)

    def denoise(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b k o"]:
        place = self.locate(condition) if condition.place is None else condition.place
        return self.action_out_proj(self.expert(self.embed_actions(x_t, time), place))

    def embed_actions(self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"]) -> Float[Tensor, "b k d"]:
        """The paper's W3 swish(W2 [W1 a, phi(t)]), appendix B."""
        if not self.head.generative:
            return self.action_token.expand(len(x_t), self.horizon, self.width)
        weight = self.action_in_proj.weight
        actions = self.action_mlp_in(self.action_in_proj(x_t.to(weight.dtype)))
        time = self.time_mlp_in(time_embedding(time, self.width).to(weight.dtype))
        return self.action_time_mlp_out(functional.silu(actions + time[:, None]))

    def completed(self, observation: Observation) -> Observation:
        """With black pictures, which nobody looks at, for the cameras that are missing (but not for all)."""
        if not any(name in observation.images for name in self.spec.camera_names):
            return observation
        state, steps = observation.state, self.obs_steps
        images, present = dict(observation.images), dict(observation.image_mask)
        for camera in self.spec.cameras:
            if camera.name not in images:
                shape = (len(state), steps, 3, camera.height, camera.width)
                images[camera.name] = torch.zeros(shape, dtype=torch.uint8, device=state.device)
                present[camera.name] = torch.zeros(len(state), dtype=torch.bool, device=state.device)
        return replace(observation, images=images, image_mask=present)

    def resized(self, observation: Observation) -> Observation:
        """Pictures at `picture_size`, padded to keep their aspect ratio."""
        if self.picture_size is None:
            return observation
        height, width = self.picture_size
        images = {
            name: resize_with_pad(image / 255.0, height, width) for name, image in observation.images.items()
        }
        return replace(observation, images=images)

    def normalized_chunks(self, actions: Float[Tensor, "n k a"]) -> Float[Tensor, "n k a"]:
        return self.pad(super().normalized_chunks(actions), self.action_width)

    def prompt_writer(self) -> PromptWriter:
        return CleanedPrompt()

    @staticmethod
    def pad(x: Float[Tensor, "b n m"], width: int) -> Float[Tensor, "b n width"]:
        """Zeros up to the model's own number of dimensions."""
        return functional.pad(x, (0, width - x.shape[-1]))
