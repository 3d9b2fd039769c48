"""pi0's and pi0.5's numbers beside lerobot's, with weights that went through librobot-import and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("lerobot")

import parity

import lerobot_pi
import tiny_models
from librobot.errors import LibrobotError
from librobot.interchange.base import ImportOptions, import_checkpoint
from librobot.interchange.lerobot import export_checkpoint, pi0, pi05
from librobot.policy import Policy

LAYOUTS = {"pi0": pi0, "pi05": pi05}
LENGTHS = {"pi0": 48, "pi05": 200}  # of lerobot's padded prompts


@pytest.fixture(params=["pi0", "pi05"])
def kind(request):
    return request.param


@pytest.fixture
def both(kind, tmp_path, monkeypatch):
    """lerobot's policy, ours imported from its folder, and the file that holds ours."""
    monkeypatch.setattr(
        pi0, "VARIANTS", {lerobot_pi.WIDTH: "gemma_2b", lerobot_pi.EXPERT_WIDTH: "gemma_300m"}
    )
    theirs = lerobot_pi.reference(kind, monkeypatch, empty_cameras=1)
    lerobot_pi.save(theirs, tmp_path / "theirs", tiny_models.statistics())
    options = ImportOptions(tokenizer=lerobot_pi.tokenizer(tmp_path / "words"))
    path, ours = import_checkpoint(tmp_path / "theirs", tmp_path / "ours.ckpt", options)
    return theirs, ours.train(), path


def given(kind, ours):
    """A batch without padding, and the texts that lerobot's preprocessor would make of its prompts."""
    data = tiny_models.batch()
    data = replace(data, action_mask=torch.ones_like(data.action_mask))
    if kind == "pi0":
        return data, [f"{prompt}\n" for prompt in data.observation.prompt]
    from lerobot.lerobot_types import TransitionKey
    from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep

    state = ours.normalized_state(data.observation)[:, -1]
    made = Pi05PrepareStateTokenizerProcessorStep()(
        {
            TransitionKey.OBSERVATION: {"observation.state": state},
            TransitionKey.COMPLEMENTARY_DATA: {"task": data.observation.prompt},
        }
    )
    return data, made[TransitionKey.COMPLEMENTARY_DATA]["task"]


def test_the_same_loss_gradients_and_actions(kind, both, monkeypatch):
    theirs, ours, _ = both
    data, prompts = given(kind, ours)
    batch = lerobot_pi.inputs(theirs, ours, data, prompts, LENGTHS[kind])
    noise, time = torch.randn(4, tiny_models.HORIZON, 8), torch.tensor([0.05, 0.4, 0.77, 1.0])
    loss, expected_loss = lerobot_pi.losses(theirs, ours, batch, data, noise, time, monkeypatch)
    differences = parity.gradient_differences(ours, theirs, LAYOUTS[kind].weight_map())
    assert len(differences) > 90

    expected = theirs.predict_action_chunk(batch, noise=noise)
    with torch.inference_mode():
        sampled = ours.eval().sample_actions(data.observation, noise=noise)
    actions = parity.relative(ours.normalizer.normalize("action", sampled), expected)
    parity.check(
        kind, loss=abs(loss / expected_loss - 1), gradients=max(differences.values()), actions=actions
    )


def test_missing_and_empty_cameras_are_masked_on_both_sides(kind, both):
    theirs, ours, _ = both
    assert [camera.name for camera in ours.spec.cameras] == ["wrist", "front"]
    assert "observation.images.empty_camera_0" in theirs.config.image_features
    data, prompts = given(kind, ours)
    batch = lerobot_pi.inputs(theirs, ours, data, prompts, LENGTHS[kind])
    del batch["observation.images.front"]
    noise = torch.randn(4, tiny_models.HORIZON, 8)
    expected = theirs.predict_action_chunk(batch, noise=noise)
    observation = data.observation
    lacking = replace(observation, images={"wrist": observation.images["wrist"]}, image_mask={})
    lacking.image_mask = {"wrist": torch.ones(4, dtype=torch.bool)}
    with torch.inference_mode():
        sampled = ours.eval().sample_actions(lacking, noise=noise)
    assert parity.relative(ours.normalizer.normalize("action", sampled), expected) <= 1e-5


def test_exported_weights_load_strictly_and_act_alike(kind, both, tmp_path):
    from safetensors.torch import load_file

    theirs, ours, path = both
    data, prompts = given(kind, ours)
    batch = lerobot_pi.inputs(theirs, ours, data, prompts, LENGTHS[kind])
    noise = torch.randn(4, tiny_models.HORIZON, 8)
    folder = export_checkpoint(path, tmp_path / "back")
    before, after = (load_file(f / "model.safetensors") for f in (tmp_path / "theirs", folder))
    assert before.keys() == after.keys()
    unread = {name for name in before if name.endswith("lm_head.weight")}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - unread)
    back = type(theirs).from_pretrained(folder, strict=True)
    back.load_state_dict(after, strict=True)  # from_pretrained only prints what does not fit
    expected = theirs.predict_action_chunk(batch, noise=noise)
    actions = back.predict_action_chunk(batch, noise=noise)  # one masked camera fewer: rounding
    assert parity.relative(actions, expected) <= 1e-5
    for key in ("chunk_size", "max_action_dim", "image_resolution", "normalization_mapping"):
        assert getattr(back.config, key) == getattr(theirs.config, key)
    again = import_checkpoint(
        folder, tmp_path / "again.ckpt", ImportOptions(tokenizer=str(tmp_path / "words"))
    )
    with torch.inference_mode():
        first, second = (
            policy.eval().sample_actions(data.observation, noise=noise) for policy in (ours, again[1])
        )
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_the_checkpoint_needs_nothing_else(kind, both):
    _, ours, path = both
    policy = Policy.from_checkpoint(path, device="cpu")
    noise = torch.randn(4, tiny_models.HORIZON, 8)
    with torch.inference_mode():
        expected, found = (
            framework.eval().sample_actions(tiny_models.batch().observation, noise=noise)
            for framework in (ours, policy.framework)
        )
    assert torch.equal(expected, found)


def test_what_ours_cannot_be_is_refused_by_name(tmp_path, monkeypatch):
    theirs = lerobot_pi.reference("pi0", monkeypatch)
    theirs.config.max_period = 5.0
    lerobot_pi.save(theirs, tmp_path / "theirs", tiny_models.statistics())
    with pytest.raises(LibrobotError, match=r"config\.json: max_period must be 4\.0, found 5\.0"):
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours.ckpt")
    framework = tiny_models.build("pi0", "ddpm")
    policy = Policy(framework, config=framework.run_config, provenance={}, device="cpu")
    with pytest.raises(LibrobotError, match="vlm must be paligemma, found TinyVLM"):
        pi0.write(policy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"1 missing: expert\.layers\.0\.attention\.q_proj\.weight"),
        ("shape", r"1 of another shape: expert\.layers\.0\.attention\.q_proj\.weight \(model \(128, 32\)"),
        ("left over", r"no part of the model takes the tensor model\.surplus"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, monkeypatch, change, message):
    from safetensors.torch import load_file, save_file

    theirs = lerobot_pi.reference("pi0", monkeypatch)
    lerobot_pi.save(theirs, tmp_path / "theirs", tiny_models.statistics())
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(file)
    name = "model.paligemma_with_expert.gemma_expert.model.layers.0.self_attn.q_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "shape":
        tensors[name] = torch.zeros(64, 32)
    else:
        tensors["model.surplus"] = torch.zeros(1)
    save_file(tensors, file)
    options = ImportOptions(tokenizer=lerobot_pi.tokenizer(tmp_path / "words"))
    with pytest.raises(LibrobotError, match=message):
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours.ckpt", options)
