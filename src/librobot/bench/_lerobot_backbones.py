"""lerobot's SmolVLA and GR00T N1.7 with the sizes and weights of ours.

lerobot reads the backbones' configurations from the model hub: here they are ours, put in while it is built.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from librobot.heads.base import hold_last
from librobot.interchange.gr00t_weights import weight_map as groot_weights
from librobot.interchange.lerobot.folder import features_of
from librobot.interchange.lerobot.smolvla import weight_map as smolvla_weights
from librobot.types import Batch, RobotSpec

SEEN = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
ACTED = ("state", "action", "action_mask", "embodiment_id")


def policy_features(spec: RobotSpec) -> dict[str, dict[str, Any]]:
    """`input_features` and `output_features` of lerobot's configurations."""
    from lerobot.configs.types import FeatureType, PolicyFeature

    return {
        key: {
            name: PolicyFeature(FeatureType[own["type"]], tuple(own["shape"])) for name, own in each.items()
        }
        for key, each in features_of(spec).items()
    }


def smolvla(ours: Any) -> nn.Module:
    """Its expert trains and its backbone does not, as in lerobot's own recipe and ours."""
    from lerobot.policies.smolvla import smolvlm_with_expert as module
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    config = ours.vlm.model.config
    tokenizer = SimpleNamespace(fake_image_token_id=1, global_image_token_id=2)
    side = config.vision_config.image_size
    with ExitStack() as stack:
        for name, made in (("AutoConfig", config), ("AutoProcessor", SimpleNamespace(tokenizer=tokenizer))):
            source = SimpleNamespace(from_pretrained=lambda *_, made=made, **__: made)
            stack.enter_context(mock.patch.object(module, name, source))
        policy = SmolVLAPolicy(
            SmolVLAConfig(
                **policy_features(ours.spec),
                chunk_size=ours.horizon,
                n_action_steps=ours.horizon,
                max_state_dim=ours.state_width,
                max_action_dim=ours.action_width,
                resize_imgs_with_padding=(side, side),
                num_vlm_layers=len(ours.vlm.blocks),
                num_steps=ours.head.num_steps,
                load_vlm_weights=False,
                device="cpu",
            )
        )
    policy.load_state_dict(smolvla_weights().to_theirs(ours.state_dict(), "ours"), strict=True)
    return policy


def groot(ours: Any) -> nn.Module:
    """GR00T N1.7 without its processors, and a frozen backbone."""
    from lerobot.policies.groot import groot_n1_7

    sizes = {"positional_embeddings": None, "dropout": 0.0, "final_dropout": True}
    heads, fusing = (part.blocks[0].attention.num_heads for part in (ours.dit, ours.fusion))
    with tempfile.TemporaryDirectory() as folder:
        ours.vlm.model.config.save_pretrained(folder)
        config = groot_n1_7.GR00TN17Config(
            model_name=folder,
            select_layer=len(ours.vlm.blocks),
            backbone_embedding_dim=ours.vlm.hidden_size,
            hidden_size=ours.action_decoder.enter.weight.shape[1],
            input_embedding_dim=ours.action_positions.shape[1],
            max_state_dim=ours.state_width,
            max_action_dim=ours.action_width,
            action_horizon=ours.horizon,
            max_num_embodiments=len(ours.action_decoder.enter.weight),
            max_seq_len=len(ours.action_positions),
            num_inference_timesteps=ours.head.num_steps,
            state_dropout_prob=0.0,
            diffusion_model_cfg=sizes
            | {
                "num_layers": len(ours.dit.blocks),
                "num_attention_heads": heads,
                "attention_head_dim": ours.action_positions.shape[1] // heads,
                "norm_type": "ada_norm",
                "output_dim": ours.action_decoder.enter.weight.shape[1],
                "interleave_self_attention": True,
            },
            vl_self_attention_cfg=sizes
            | {
                "num_layers": len(ours.fusion.blocks),
                "num_attention_heads": fusing,
                "attention_head_dim": ours.vlm.hidden_size // fusing,
            },
        )
        policy = groot_n1_7.GR00TN17(config, load_backbone_weights=False)
    policy.load_state_dict(groot_weights().to_theirs(ours.state_dict(), "ours"), strict=True)
    return policy.float()


def groot_batch(ours: Any, data: Batch) -> dict[str, Tensor]:
    """What lerobot's processors make of it: pictures as patches, numbers padded to the model's widths."""
    observation = ours.prepare(data.observation)
    inputs = observation.inputs
    real = functional.pad(ours.real_actions(data), (0, ours.action_width - ours.spec.action_dim))
    actions = ours.pad(ours.clipped("action", ours.normalized_actions(data)), ours.action_width)
    return {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"].long(),
        **ours.vlm._pictures(observation),
        "state": ours.pad(ours.clipped("state", ours.normalized_state(observation)), ours.state_width),
        "action": hold_last(actions, real),
        "action_mask": real.float(),
        "embodiment_id": torch.full((data.batch_size,), ours.slot_of_robot[0], device=actions.device),
    }


def groot_loss(policy: Any, batch: dict[str, Tensor], noise: Tensor, time: Tensor) -> Tensor:
    with drawn(policy, noise, time):
        return policy.action_head(policy.backbone(some(batch, SEEN)), some(batch, ACTED))["loss"]


def groot_sample(policy: Any, batch: dict[str, Tensor], noise: Tensor) -> Tensor:
    acted = some(batch, ("state", "embodiment_id"))
    with drawn(policy, noise):
        return policy.action_head.get_action(policy.backbone(some(batch, SEEN)), acted)["action_pred"]


def some(batch: dict[str, Tensor], names: tuple[str, ...]) -> Any:
    from transformers.feature_extraction_utils import BatchFeature

    return BatchFeature(data={name: batch[name] for name in names})


@contextmanager
def drawn(policy: Any, noise: Tensor, time: Tensor | None = None) -> Iterator[None]:
    """lerobot draws where it stands; its time is 0 at the noise, ours 1."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "randn", return_value=noise))
        if time is not None:
            head = policy.action_head
            stack.enter_context(mock.patch.object(head, "sample_time", return_value=1 - time))
        yield
