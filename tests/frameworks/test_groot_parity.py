"""GR00T N1.7's numbers beside lerobot's, with the same weights and the same inputs."""

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from parity import relative

import tiny_models
from librobot.config.build import build_framework
from librobot.heads.base import hold_last
from librobot.interchange.gr00t_weights import weight_map
from librobot.nn.squeezed_pictures import SizedProcessor, squeezed
from librobot.types import Batch, Camera, Dim, RobotSpec

pytest.importorskip("lerobot")
pytest.importorskip("diffusers")

SLOT = 1
SAME_LENGTH = ["reach the red cube", "reach the big cube", "touch the red disc", "press the red knob"]
WIDE = tiny_models.SPEC
NARROW = RobotSpec(
    name="narrow",
    cameras=(Camera("wrist", 24, 32), Camera("front", 32, 32)),
    state=tuple(Dim(f"s{i}") for i in range(2)),
    action=tuple(Dim(f"a{i}") for i in range(2)),
    control_hz=10.0,
)


def build_ours(robots=None, **changes):
    """With random weights, the norms' and the padding tokens' included."""
    torch.manual_seed(0)
    changes = {"dropout": 0.0, "state_dropout": 0.0, "slots": [SLOT]} | changes
    plain = tiny_models.config("groot_n17", vlm="qwen3vl_tiny", **changes)
    plain["vlm"] |= {"final_norm": False}
    ours = build_framework(OmegaConf.create(plain), WIDE, robots)
    fitted = [tiny_models.statistics(robot) for robot in robots or (WIDE,)]
    ours.normalizer.fit(fitted if robots else fitted[0])
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if not name.startswith("vlm.") and parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return ours


def build_theirs(ours, folder, *, num_fusion_layers=2):
    from lerobot.policies.groot import groot_n1_7

    ours.vlm.model.config.save_pretrained(folder)
    shared = {"positional_embeddings": None, "dropout": 0.0, "final_dropout": True}
    config = groot_n1_7.GR00TN17Config(
        model_name=str(folder),
        select_layer=2,
        backbone_embedding_dim=64,
        hidden_size=48,
        input_embedding_dim=32,
        max_state_dim=8,
        max_action_dim=8,
        action_horizon=tiny_models.HORIZON,
        max_num_embodiments=3,
        max_seq_len=16,
        state_dropout_prob=0.0,
        tune_llm=True,
        tune_visual=True,
        diffusion_model_cfg=shared
        | {
            "num_layers": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "norm_type": "ada_norm",
            "output_dim": 48,
            "interleave_self_attention": True,
        },
        vl_self_attention_cfg=shared
        | {"num_layers": num_fusion_layers, "num_attention_heads": 4, "attention_head_dim": 16},
    )
    theirs = groot_n1_7.GR00TN17(config, load_backbone_weights=False)
    theirs.load_state_dict(weight_map().to_theirs(ours.state_dict(), "ours"), strict=True)
    return theirs.float()


def features(batch_or_inputs):
    from transformers.feature_extraction_utils import BatchFeature

    return BatchFeature(data=batch_or_inputs)


def clipped(ours, x):
    """What lerobot's processors do before and after the model."""
    return x.clamp(-1, 1) if ours.bounded else x


def inputs_of(ours, data: Batch, slots):
    """The backbone's and the action head's inputs as lerobot's model takes them."""
    observation = ours.prepare(data.observation)
    inputs = observation.inputs
    seen = {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"].long(),
        **ours.vlm._pictures(observation),
    }
    real = torch.nn.functional.pad(ours.real_actions(data), (0, 8 - WIDE.action_dim))
    actions = ours.pad(clipped(ours, ours.normalized_actions(data)), 8)
    acting = {
        "state": ours.pad(clipped(ours, ours.normalized_state(observation)), 8),
        "action": hold_last(actions, real),
        "action_mask": real.float(),
        "embodiment_id": slots,
    }
    return features(seen), features(acting)


def their_loss(theirs, seen, acting, noise, tau, monkeypatch):
    head = theirs.action_head
    monkeypatch.setattr(head, "sample_time", lambda *args, **kwargs: tau)
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: noise)
    loss = head(theirs.backbone(seen), acting)["loss"]
    monkeypatch.undo()
    return loss


def their_actions(theirs, seen, acting, noise, monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: noise)
    acting = features({key: acting[key] for key in ("state", "embodiment_id")})
    actions = theirs.action_head.get_action(theirs.backbone(seen), acting)["action_pred"]
    monkeypatch.undo()
    return actions


def drawn():
    draw = torch.Generator().manual_seed(3)
    noise = torch.randn(4, tiny_models.HORIZON, 8, generator=draw)
    return noise, torch.tensor([0.1234, 0.5005, 0.7777, 0.9876])


def mixed(data: Batch) -> Batch:
    """The second and the fourth sample are the narrow robot's: zeros where it has no dimensions."""
    embodiment = torch.tensor([0, 1, 0, 1])
    state, actions = data.observation.state.clone(), data.actions.clone()
    state[1::2, :, NARROW.state_dim :] = 0
    actions[1::2, :, NARROW.action_dim :] = 0
    return replace(
        data, observation=replace(data.observation, state=state, embodiment=embodiment), actions=actions
    )


@pytest.mark.parametrize("robots", [None, (WIDE, NARROW)], ids=["one robot", "two robots in a batch"])
def test_loss_gradients_and_actions(robots, tmp_path, monkeypatch):
    slots = [SLOT] if robots is None else [SLOT, 2]
    changes = {"slots": slots, "clip_normalized": robots is not None}
    ours = build_ours(robots, **changes).train()
    theirs = build_theirs(ours, tmp_path).train()
    back = weight_map().to_ours(theirs.state_dict(), "theirs")
    other = build_ours(robots, **changes)
    other.load_weights(back | {n: v for n, v in ours.state_dict().items() if n.startswith("normalizer.")})
    data = tiny_models.batch()
    data.observation.prompt = SAME_LENGTH
    if robots is not None:
        data = mixed(data)
    noise, tau = drawn()
    seen, acting = inputs_of(ours, data, torch.tensor(slots).repeat(4)[:4])

    loss, _ = other.train().compute_loss(data, noise=noise, time=1 - tau)
    expected = their_loss(theirs, seen, acting, noise, tau, monkeypatch)
    print("loss", relative(loss.detach(), expected.detach()))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)

    loss.backward(), expected.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    copied = weight_map().to_ours(gradients, "gradients")
    own = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    assert set(own) == set(copied)
    # A key's bias moves all logits alike: its gradient is zero but for rounding.
    norms = {n: (own[n].norm(), copied[n].norm()) for n in own if not n.endswith("attention.k_proj.bias")}
    differences = {n: (abs(a - b) / b).item() for n, (a, b) in norms.items()}
    worst = max(differences, key=differences.get)
    print("gradient norm", worst, differences[worst], "of", len(own))
    assert differences[worst] < 1e-5
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, copied[name], rtol=1e-3, atol=1e-6)

    other.eval(), theirs.eval()
    normalized = their_actions(theirs, seen, acting, noise, monkeypatch)[..., : WIDE.action_dim]
    ids = data.observation.embodiment
    expected = ours.normalizer.unnormalize("action", clipped(ours, normalized), ids)
    with torch.no_grad():
        found = other.sample_actions(data.observation, noise=noise)
    print("actions", relative(found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing(tmp_path, monkeypatch):
    """Prompts of different lengths in one batch give what lerobot's model gives for each sample alone."""
    ours = build_ours().eval()
    theirs = build_theirs(ours, tmp_path).eval()
    data = tiny_models.batch()
    noise, tau = drawn()
    with torch.no_grad():
        loss, _ = ours.compute_loss(data, noise=noise, time=1 - tau)
        found = ours.sample_actions(data.observation, noise=noise)
    total = count = 0.0
    for row in range(4):
        one = slice(row, row + 1)
        observation = replace(
            data.observation,
            images={name: image[one] for name, image in data.observation.images.items()},
            image_mask={name: mask[one] for name, mask in data.observation.image_mask.items()},
            state=data.observation.state[one],
            prompt=data.observation.prompt[one],
        )
        alone = Batch(observation, data.actions[one], data.action_mask[one])
        seen, acting = inputs_of(ours, alone, torch.tensor([SLOT]))
        weight = acting["action_mask"].sum()
        total += weight * their_loss(theirs, seen, acting, noise[one], tau[one], monkeypatch)
        count += weight
        normalized = their_actions(theirs, seen, acting, noise[one], monkeypatch)[..., : WIDE.action_dim]
        expected = ours.normalizer.unnormalize("action", clipped(ours, normalized))
        torch.testing.assert_close(found[one], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, (total / count).detach(), rtol=1e-5, atol=0)


def test_pictures_are_squeezed_as_lerobot_does():
    from lerobot.policies.groot.processor_groot import _transform_n1_7_image_for_vlm_torch

    image = torch.randint(0, 256, (2, 1, 3, 120, 161), dtype=torch.uint8)
    found = squeezed(image, (256, 256), 230 / 256)
    for row in range(2):
        expected = _transform_n1_7_image_for_vlm_torch(
            image[row, 0],
            image_crop_size=[230, 230],
            image_target_size=[256, 256],
            shortest_image_edge=None,
            crop_fraction=None,
        )
        assert torch.equal(found[row, 0], expected)


def test_the_backbone_sees_the_squeezed_pictures():
    ours = build_ours(picture_size=[64, 96], picture_crop=0.9).eval()
    ours.vlm.processor.min_pixels, ours.vlm.processor.max_pixels = 1024, 65536
    observation = ours.prepare(tiny_models.batch().observation)
    sized = SizedProcessor(ours.vlm.processor, (64, 96))(["reach"], observation.images)
    assert (sized["camera"] > 0).sum() == 2 * 2 * 3  # two pictures of 2 x 3 tokens of 32 pixels
    assert isinstance(ours.processor.processor, SizedProcessor)
