"""What every framework shares: each Lightning hook, normalisation, optimiser groups, checkpoint contents.

A framework is this class plus its paper's method: `__init__`, `compute_loss`, `sample_actions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from lightning import LightningModule
from torch import Tensor, nn

from librobot import __version__, replicas
from librobot.errors import LibrobotError, nearest
from librobot.frameworks.checkpoint import fit_state_dict, plain
from librobot.frameworks.distillation import learn_from, move_own_parts
from librobot.frameworks.embodiments import Embodiments
from librobot.frameworks.groups import ParameterGroups
from librobot.frameworks.policy_parts import check_head, named_part
from librobot.frameworks.randomness import begin_batch, is_logged
from librobot.frameworks.sharding import clip_norm, scales_nothing, shard
from librobot.heads.base import ActionHead, NetworkKind
from librobot.losses import l1
from librobot.normalize import NormalizationMode, Normalizer
from librobot.types import Batch, Observation, RobotSpec
from librobot.vlms.base import VLM, ObservationProcessor, PromptWriter

OptimizerFactory = Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer]
SchedulerFactory = Callable[..., Any]


class Framework(LightningModule):
    """Base of all frameworks.

    `horizon` is the number of actions in a chunk, `obs_steps` the number of observation steps it is predicted
    from. `normalization` names a mode for "state" and for "action" (see `librobot.normalize`). `freeze` lists
    parts that do not train, `lr_multipliers` maps parts to factors on the learning rate; a part is the dotted
    beginning of parameter names ("vlm", "vlm.towers") or a pattern with `*`. `action_width` is the number of
    action dimensions that the head sees, None where nothing is padded. `embodiments` are the robots that the
    policy is for, where they are several: `spec` is then their union (the largest dimensions, all cameras).

    `action_offset` is the step of a chunk's first action, counted from the current one: negative where a
    method also predicts the actions before it, 0 for most. `language_options` and `state_options` are
    options with which a framework reads the instruction, or the state, where it does not by default.

    `reads_goals` says whether goal pictures mean something to the framework, `wants_goals` asks the data for
    them: a later frame of each sample's episode.

    `brings` says which kinds of network the framework has for its head, `denoiser_parts` which of its parts
    only the denoiser uses: they train when a head learns from a trained policy (`learn_from`), all others
    are frozen. `block_lists` are the parts that are lists of blocks, beside the backbone's: what is sharded,
    recomputed and compiled one by one; `splits_heads` says whether tensor parallelism may split attention:
    where whoever reads a cache has its heads split alike. `needs_cache` is True where the backbone has to
    run tokens behind its context (`VLM.extend`), `reads_state` False where the method sees no state,
    `masks_cameras` False where it cannot act without one of its cameras.
    """

    brings: ClassVar[tuple[NetworkKind, ...]] = ("denoiser",)
    needs_cache: ClassVar[bool] = False
    masks_cameras: ClassVar[bool] = True
    reads_state: ClassVar[bool] = True
    several_robots: ClassVar[bool] = True
    denoiser_parts: ClassVar[tuple[str, ...]] = ()
    block_lists: tuple[str, ...] = ()
    splits_heads: bool = False
    language_options: ClassVar[Mapping[str, Any]] = {}
    state_options: ClassVar[Mapping[str, Any]] = {}
    action_offset: int = 0
    reads_goals: bool = False
    wants_goals: bool = False

    def __init__(
        self,
        *,
        spec: RobotSpec,
        vlm: VLM | None,
        head: ActionHead,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        horizon: int,
        obs_steps: int = 1,
        normalization: Mapping[str, NormalizationMode],
        freeze: Sequence[str] = (),
        lr_multipliers: Mapping[str, float] | None = None,
        action_width: int | None = None,
        embodiments: Sequence[RobotSpec] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("horizon", horizon), ("obs_steps", obs_steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        self.spec = spec
        self.horizon = horizon
        self.obs_steps = obs_steps
        self.action_width = spec.action_dim if action_width is None else action_width
        check_head(type(self), head)
        head.attach(horizon=horizon, action_dim=self.action_width, real_dim=spec.action_dim)
        self.vlm = vlm
        self.head = head
        self.robots = Embodiments(spec, embodiments)
        self.normalizer = Normalizer(
            {"state": spec.state_dim, "action": spec.action_dim},
            normalization,
            embodiments=len(self.robots),
        )
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._freeze = tuple(freeze)
        self._lr_multipliers = dict(lr_multipliers or {})
        self.param_groups = ParameterGroups()
        self.run_config: dict[str, Any] = {}
        self.provenance: dict[str, Any] = {}
        self._seed = 0
        self._part = replicas.Part(0, 1, 0)
        self._is_sharded = False
        self._teacher: tuple[Framework, ...] = ()  # no submodule: its weights are not this policy's

    # What a framework implements.

    def compute_loss(
        self, batch: Batch, *, noise: Tensor | None = None, time: Tensor | None = None
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The training loss and what to log beside it. `noise` and `time` fix the head's randomness."""
        raise NotImplementedError

    def sample_actions(
        self,
        observation: Observation,
        *,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
    ) -> Float[Tensor, "b k a"]:
        """A chunk of actions in physical units, from the current step on. `noise`, `num_steps` and `guidance`
        are the head's: see `ActionHead.sample`."""
        raise NotImplementedError

    def denoise(
        self, x_t: Float[Tensor, "b k a"], time: Float[Tensor, " b"], context: Any
    ) -> Float[Tensor, "b k o"]:
        """The network that the head sees, for a framework that brings a denoiser."""
        raise NotImplementedError

    @property
    def num_future_actions(self) -> int:
        """How many actions `sample_actions` gives: those of a chunk from the current step on."""
        return self.horizon + self.action_offset

    @property
    def processor(self) -> ObservationProcessor | None:
        """What turns prompts into `Observation.inputs`; None where the method reads no language. Taken anew
        whenever data are about to be read, so that it knows the statistics of that time."""
        if self.vlm is None:
            return None
        return ObservationProcessor(self.vlm.processor, self.spec.camera_names, self.prompt_writer())

    def prompt_writer(self) -> PromptWriter | None:
        """What writes the framework's own prompt around an instruction; None leaves it as it is."""
        return None

    # What a framework calls.

    def prepare(self, observation: Observation) -> Observation:
        """Cameras in the robot's order, the processor's inputs, and a check against the robot's spec."""
        spec = self.spec
        self.robots.ids(observation)
        missing = [name for name in spec.camera_names if name not in observation.images]
        if missing:
            raise LibrobotError(
                f"the observation lacks camera {missing[0]!r} of robot {spec.name!r}; "
                f"{nearest(missing[0], observation.images)}"
            )
        expected = (self.obs_steps, spec.state_dim)
        if tuple(observation.state.shape[1:]) != expected:
            raise LibrobotError(
                f"the observation's state must have shape (b, {expected[0]}, {expected[1]}) for robot "
                f"{spec.name!r} and obs_steps={self.obs_steps}, found {tuple(observation.state.shape)}"
            )
        inputs = observation.inputs
        if inputs is None and self.processor is not None:
            made = self.processor(observation.prompt, observation.images, observation.state)
            inputs = {key: value.to(observation.state.device) for key, value in made.items()}
        return Observation(
            images={name: observation.images[name] for name in spec.camera_names},
            image_mask={name: observation.image_mask[name] for name in spec.camera_names},
            state=observation.state,
            prompt=observation.prompt,
            inputs=inputs,
            embodiment=observation.embodiment,
            goal_images=observation.goal_images,
        )

    @property
    def embodiments(self) -> tuple[RobotSpec, ...]:
        """The robots that the policy is for: its one, where they are not several."""
        return self.robots.specs

    def embodiment_ids(self, observation: Observation) -> Int[Tensor, " b"]:
        """Each sample's robot among `embodiments`, 0 where the observation does not say."""
        return self.robots.ids(observation)

    def real_actions(self, batch: Batch) -> Bool[Tensor, "b k a"]:
        """Which numbers of a batch's actions count: steps before the episode's end, dimensions that the
        sample's robot has."""
        return batch.action_mask[:, :, None] & self.robots.owned_dims(batch)

    def of_dimensions(self, values: Shaped[Tensor, "b k w"]) -> Shaped[Tensor, "b k a"]:
        """Of numbers for each dimension that the head sees, those of the actions' own, in their order."""
        return values[..., : self.spec.action_dim]

    def normalized_state(self, observation: Observation) -> Float[Tensor, "b t s"]:
        ids = observation.embodiment
        return self.normalizer.normalize("state", observation.state, ids).to(self.compute_dtype)

    def normalized_actions(self, batch: Batch) -> Float[Tensor, "b k a"]:
        if batch.actions.shape[1:] != (self.horizon, self.spec.action_dim):
            raise LibrobotError(
                f"actions must have shape (b, {self.horizon}, {self.spec.action_dim}) for robot "
                f"{self.spec.name!r} and horizon={self.horizon}, found {tuple(batch.actions.shape)}"
            )
        ids = batch.observation.embodiment
        actions = self.normalizer.normalize("action", batch.actions, ids).to(self.compute_dtype)
        return actions if ids is None else actions.masked_fill(~self.robots.owned_dims(batch), 0.0)

    def physical_actions(
        self, actions: Float[Tensor, "b k a"], observation: Observation
    ) -> Float[Tensor, "b k a"]:
        return self.normalizer.unnormalize("action", actions.float(), observation.embodiment)

    def normalized_chunks(self, actions: Float[Tensor, "n k a"]) -> Float[Tensor, "n k a"]:
        """Chunks in physical units as the head sees them, for `ActionHead.fit`."""
        return self.normalizer.normalize("action", actions)

    def learn_from(self, teacher: Framework) -> None:
        """Start from a trained policy, and let the head learn from it: `librobot.frameworks.distillation`."""
        learn_from(self, teacher)

    @property
    def has_teacher(self) -> bool:
        return bool(self._teacher)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the framework's own weights: float32, or bfloat16 under `trainer.precision=bf16-true`.
        The backbone's may differ (`vlm.dtype`)."""
        own = (child for name, child in self.named_children() if name != "vlm")  # its parameters are many
        found = next((parameter for child in own for parameter in child.parameters()), None)
        return torch.float32 if found is None else found.dtype  # the backbone may be all there is

    def named_part(self, part: str) -> list[tuple[str, nn.Parameter]]:
        """The parameters of a part. Raises LibrobotError where there are none, naming the nearest part."""
        return named_part(self, part)

    def freeze_unused(self, layers: Sequence[int], *, logits: bool = False) -> None:
        """Stop the gradients of what the backbone's `Context` of these `layers` does not depend on, nor, with
        `logits`, what it says next."""
        if self.vlm is not None:
            for parameter in self.vlm.unused_parameters(layers, logits=logits):
                parameter.requires_grad_(False)

    def apply_freeze(self) -> None:
        """Stop the gradients of the frozen parts. A framework calls this at the end of its `__init__`."""
        for part in self._freeze:
            for _, parameter in self.named_part(part):
                parameter.requires_grad_(False)

    # Lightning.

    def on_fit_start(self) -> None:
        self._seed = torch.initial_seed()
        if hasattr(self.head, "teach") and not self.has_teacher:
            raise LibrobotError(
                f"head.teacher: head {type(self.head).__name__} learns from a trained policy; give "
                f"head.teacher=CHECKPOINT, of the same framework and backbone, with a flow or diffusion head"
            )
        for teacher in self._teacher:
            move_own_parts(self, teacher, self.device, self.compute_dtype)
        if self.trainer.world_size > 1:  # each process fitted its own: the first one's counts
            self.head.restore(self.trainer.strategy.broadcast(self.head.files()))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, Batch):
            empty = (~batch.action_mask.any(dim=1)).nonzero()
            if len(empty):
                raise LibrobotError(
                    f"sample {int(empty[0])} of a batch has no action to learn from: its action_mask is "
                    f"False at all {self.horizon} steps; leave such samples out of the dataset"
                )
        if self.trainer.training:
            self._part = begin_batch(self._seed, self.trainer)
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if not isinstance(batch, Batch):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return batch.to(device, non_blocking=device.type != "cpu")  # Lightning's walk takes a millisecond

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with replicas.part(self._part):
            loss, metrics = self.compute_loss(batch)
            for name, value in {"loss": loss, **metrics}.items():
                if self._part.count > 1 and is_logged(self.trainer):
                    value = replicas.mean(value)
                self.log(f"train/{name}", value, prog_bar=name == "loss", batch_size=batch.batch_size)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The loss, and how far sampled actions are from the demonstrated ones (mean absolute error,
        normalised). The same random numbers every time, so that two epochs' values compare.

        Callbacks get both actions, (b, k, a) in physical units and normalised, and which numbers are real.
        """
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(batch_idx)
            loss, metrics = self.compute_loss(batch)
            sampled = self.sample_actions(batch.observation)
        ids, future = batch.observation.embodiment, slice(-self.action_offset, None)
        target, real = batch.actions[:, future], self.real_actions(batch)[:, future]
        out = {"sampled": sampled, "target": target, "real": real}
        for name in ("sampled", "target"):
            out[f"{name}_normalized"] = self.normalizer.normalize("action", out[name], ids)
        error = l1(out["sampled_normalized"], out["target_normalized"], real).mean()
        for name, value in (metrics | {"loss": loss, "action_error": error}).items():
            self.log(f"val/{name}", value, batch_size=batch.batch_size, sync_dist=True)
        return out

    def configure_model(self) -> None:
        if self.device_mesh is not None and not self._is_sharded:
            shard(self, self.device_mesh, self.trainer.strategy.root_device)
            self._is_sharded = True

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: Any = None
    ) -> None:
        own = self._is_sharded or scales_nothing(self.trainer)
        if own and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            clip_norm([p for group in optimizer.param_groups for p in group["params"]], gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self.param_groups(self, self._lr_multipliers))
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_multiplier"]
        steps = self.trainer.estimated_stepping_batches
        known = isinstance(steps, int) and steps > 0
        scheduler = self._scheduler(optimizer, total_steps=steps if known else None)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Checkpoints.

    def attach_run(self, *, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        """What checkpoints remember beside weights: the resolved configuration and the data's origin.

        Raises LibrobotError where a value is not plain (numbers, text, None, lists and dictionaries of them).
        """
        self.run_config = plain(config, "config")
        self.provenance = plain(provenance, "provenance")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["librobot"] = {
            "version": __version__,
            "config": self.run_config,
            "spec": plain(self.robots.own_union.to_dict(), "spec"),
            "embodiments": [plain(robot.to_dict(), "embodiments") for robot in self.robots.own],
            "provenance": self.provenance,
            "backbone": self.vlm.files() if self.vlm is not None else {},
            "head": self.head.files(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.head.restore(checkpoint["librobot"].get("head", {}))

    def load_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load weights that must fit exactly. Raises LibrobotError with the names that do not."""
        fit_state_dict(self, state_dict)
