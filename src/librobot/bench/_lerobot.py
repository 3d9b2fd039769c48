"""lerobot's policies with the sizes and weights of ours, and the same batch for both."""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from librobot.bench import _lerobot_backbones as backbones
from librobot.bench import _lerobot_fast as fast
from librobot.errors import require
from librobot.frameworks.base import Framework
from librobot.interchange.lerobot import policy_module
from librobot.interchange.lerobot.folder import STATE, write_folder
from librobot.policy import Policy
from librobot.types import Batch


@dataclass
class Peer:
    """A policy of lerobot with the same weights. `batch` is what its preprocessor would make of ours."""

    policy: Any
    batch: dict[str, Tensor]
    inputs: torch.dtype = torch.float32  # of what it samples from

    def loss(self, noise: Tensor, time: Tensor) -> Tensor:
        with self.fixed(noise, time):
            return self.policy(dict(self.batch))[0]

    @contextmanager
    def fixed(self, noise: Tensor, time: Tensor) -> Iterator[None]:
        """The same noise and time as ours, where the policy has a flow."""
        model: Any = getattr(self.policy, "model", None)
        with ExitStack() as stack:
            for name, value in (("sample_noise", noise), ("sample_time", time)):
                if hasattr(model, name):
                    stack.enter_context(mock.patch.object(model, name, lambda *_, value=value: value))
            yield

    def to(self, dtype: torch.dtype) -> None:
        """lerobot keeps parts of pi0 and pi0.5 in single precision, and so what they are given."""
        inner: Any = getattr(getattr(self.policy, "model", None), "paligemma_with_expert", None)
        if hasattr(inner, "to_bfloat16_for_selected_params"):
            inner.to_bfloat16_for_selected_params("bfloat16" if dtype == torch.bfloat16 else "float32")
            return
        self.policy.to(dtype)
        self.inputs = dtype
        self.batch = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in self.batch.items()
        }

    def sample(self, noise: Tensor) -> Tensor:
        """A chunk, normalised."""
        batch = dict(self.batch)
        noise = noise.to(self.inputs)
        if hasattr(self.policy, "diffusion"):
            pictures = [batch[key] for key in self.policy.config.image_features]
            batch["observation.images"] = torch.stack(pictures, dim=-4)
            return self.policy.diffusion.generate_actions(batch, noise=noise)
        if hasattr(self.policy.model, "sample_noise"):
            return self.policy.predict_action_chunk(batch, noise=noise)
        return self.policy.predict_action_chunk(batch)


class GrootPeer(Peer):
    """Its model, without the processors around it."""

    def loss(self, noise: Tensor, time: Tensor) -> Tensor:
        return backbones.groot_loss(self.policy, self.batch, noise, time)

    def sample(self, noise: Tensor) -> Tensor:
        return backbones.groot_sample(self.policy, self.batch, noise)


class FastPeer(Peer):
    """Writes tokens."""

    def sample(self, noise: Tensor) -> Tensor:
        return fast.sample(self.policy, self.batch)


KINDS = {"groot": GrootPeer, "pi0_fast": FastPeer}


def peer_of(name: str, ours: Framework, data: Batch) -> Peer:
    """lerobot's policy for `ours`. Raises LibrobotError where lerobot is not installed."""
    require("lerobot", "lerobot")
    policy: nn.Module = PEERS[name](ours)
    policy.train(ours.training)
    return KINDS.get(name, Peer)(policy.to(next(ours.parameters()).device), BATCHES[name](ours, data))


def from_folder(type_name: str, class_name: str) -> Callable[[Framework], nn.Module]:
    """For policies whose sizes all stand in config.json: written by our export, loaded by lerobot."""

    def load(ours: Framework) -> nn.Module:
        module = importlib.import_module(f"lerobot.policies.{type_name}.modeling_{type_name}")
        policy = Policy(copy.deepcopy(ours), config=ours.run_config)  # which a policy freezes
        with tempfile.TemporaryDirectory() as folder:
            exported = policy_module(type_name, Path(folder)).write(policy)
            write_folder(exported, policy, Path(folder) / "policy")
            return getattr(module, class_name).from_pretrained(Path(folder) / "policy")

    return load


def gemma_expert(type_name: str) -> Callable[[Framework], nn.Module]:
    """pi0 and pi0.5, whose sizes lerobot fixes in its code: they are put in while it is built."""

    def build(ours: Any) -> nn.Module:
        from lerobot.policies import pi_gemma

        module = importlib.import_module(f"lerobot.policies.{type_name}.modeling_{type_name}")
        configs = importlib.import_module(f"lerobot.policies.{type_name}.configuration_{type_name}")
        config = ours.vlm.model.config
        text = config.text_config

        def resized(theirs: Any) -> Any:
            if hasattr(theirs, "vision_config"):
                for key in (
                    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "image_size", "projection_dim",
                ):  # fmt: skip
                    setattr(theirs.vision_config, key, getattr(config.vision_config, key))
                theirs.vision_config.projection_dim = config.projection_dim
                theirs.text_config.vocab_size = text.vocab_size
            else:
                theirs.vocab_size = text.vocab_size
            return theirs

        def variant(name: str) -> SimpleNamespace:
            is_expert = name == "gemma_300m"
            mlp = ours.expert.layers[0].mlp.gate.out_features if is_expert else text.intermediate_size
            return SimpleNamespace(
                width=ours.width if is_expert else text.hidden_size,
                depth=text.num_hidden_layers,
                mlp_dim=mlp,
                num_heads=text.num_attention_heads,
                num_kv_heads=text.num_key_value_heads,
                head_dim=text.head_dim,
            )

        spec = ours.spec
        side = config.vision_config.image_size
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(module, "get_gemma_config", variant))
            for name in ("PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM"):
                original = getattr(pi_gemma, name)
                stack.enter_context(
                    mock.patch.object(
                        module, name, lambda config, original=original: original(resized(config))
                    )
                )
            policy = getattr(module, f"{type_name.upper()}Policy")(
                getattr(configs, f"{type_name.upper()}Config")(
                    **backbones.policy_features(spec),
                    chunk_size=ours.horizon,
                    n_action_steps=ours.horizon,
                    max_state_dim=getattr(ours, "state_width", spec.state_dim),
                    max_action_dim=ours.action_width,
                    image_resolution=(side, side),
                    device="cpu",
                )
            )
        table = policy_module(type_name, Path("bench")).weight_map()
        policy.load_state_dict(table.to_theirs(with_output_layer(ours), "ours"), strict=True)
        return policy

    return build


def with_output_layer(ours: Framework) -> dict[str, Tensor]:
    """Our weights with the tied output layer under its own name, as lerobot keeps it."""
    weights = dict(ours.state_dict())
    embedding = "vlm.model.model.language_model.embed_tokens.weight"
    return weights | {"vlm.model.lm_head.weight": weights[embedding]}


def plain_batch(ours: Any, data: Batch) -> dict[str, Tensor]:
    """Pictures in [0, 1], the newest state and all actions normalised."""
    images = data.observation.images
    return {
        **{f"observation.images.{name}": image[:, 0] / 255 for name, image in images.items()},
        STATE: ours.normalized_state(data.observation)[:, -1],
        "action": ours.normalized_actions(data),
        "action_is_pad": ~data.action_mask,
    }


def standardised_batch(ours: Any, data: Batch) -> dict[str, Tensor]:
    """For networks over ResNet-18: pictures minus ImageNet's mean over its deviation."""
    resnet = ours.resnet if hasattr(ours, "resnet") else ours.encoders[0].resnet
    mean, std = resnet.mean, resnet.std
    made = plain_batch(ours, data)
    steps = slice(None) if ours.obs_steps > 1 else 0
    images = data.observation.images.items()
    pictures = {f"observation.images.{name}": (image / 255 - mean) / std for name, image in images}
    state = ours.normalized_state(data.observation)[:, steps]
    return made | {name: picture[:, steps] for name, picture in pictures.items()} | {STATE: state}


def worded_batch(ours: Any, data: Batch) -> dict[str, Tensor]:
    """With the token ids of the instruction that our backbone's processor made, without its pictures'."""
    inputs = ours.prepare(data.observation).inputs
    words = inputs["camera"] == 0
    length = int((words & inputs["attention_mask"]).sum(dim=1).max())
    order = (~(words & inputs["attention_mask"])).int().argsort(dim=1, stable=True)[:, :length]
    real = (words & inputs["attention_mask"]).gather(1, order)
    return plain_batch(ours, data) | {
        "observation.language.tokens": inputs["input_ids"].gather(1, order),
        "observation.language.attention_mask": real,
    }


def written_batch(ours: Any, data: Batch) -> dict[str, Tensor]:
    """With the tokens of the answers."""
    return worded_batch(ours, data) | fast.answers(ours, data)


PEERS: dict[str, Callable[[Any], nn.Module]] = {
    "act": from_folder("act", "ACTPolicy"),
    "diffusion_policy": from_folder("diffusion", "DiffusionPolicy"),
    "pi0": gemma_expert("pi0"),
    "pi0_as_published": gemma_expert("pi0"),
    "pi05": gemma_expert("pi05"),
    "pi0_fast": fast.pi0_fast,
    "smolvla": backbones.smolvla,
    "groot": backbones.groot,
}
BATCHES: dict[str, Callable[[Any, Batch], dict[str, Tensor]]] = {
    "act": standardised_batch,
    "diffusion_policy": standardised_batch,
    "pi0": worded_batch,
    "pi0_as_published": worded_batch,
    "pi05": worded_batch,
    "pi0_fast": written_batch,
    "smolvla": worded_batch,
    "groot": backbones.groot_batch,
}
