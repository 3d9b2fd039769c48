"""lerobot's checkpoint folders of ACT, Diffusion Policy and SmolVLA, both ways: from physical observations to
physical actions, through the files, their processors and statistics."""

from __future__ import annotations

import json

import numpy as np
import pytest
import test_act_parity
import test_diffusion_policy_parity
import test_smolvla_parity
import torch
from parity import relative
from test_smolvla_parity import reference as smolvla_reference  # noqa: F401

import tiny_models
from librobot.errors import LibrobotError
from librobot.interchange.base import import_checkpoint
from librobot.interchange.lerobot import export_checkpoint
from librobot.policy import Policy

pytest.importorskip("lerobot")


def dataset_statistics(spec):
    """As lerobot keeps them; the second dimension of the state never changes."""
    ours = tiny_models.statistics(spec)
    ours["state"]["std"][1] = 0.0
    ours["state"]["min"][1] = ours["state"]["max"][1] = ours["state"]["mean"][1]
    made = {"observation.state": ours["state"], "action": ours["action"]}
    for number, camera in enumerate(spec.cameras):
        made[f"observation.images.{camera.name}"] = {
            "mean": np.array([0.4, 0.5, 0.45 + 0.1 * number]).reshape(3, 1, 1),
            "std": np.array([0.2, 0.25, 0.3]).reshape(3, 1, 1),
        }
    return {
        key: {n: torch.tensor(v, dtype=torch.float32) for n, v in own.items()} for key, own in made.items()
    }


def processors(config, folder=None, statistics=None):
    from lerobot.policies.factory import make_pre_post_processors

    if statistics is None:
        return make_pre_post_processors(config, pretrained_path=str(folder))
    return make_pre_post_processors(config, dataset_stats=statistics)


def saved(policy, spec, folder):
    policy.save_pretrained(folder)
    for part in processors(policy.config, statistics=dataset_statistics(spec)):
        part.save_pretrained(folder)
    return folder


def observation_of(spec, obs_steps):
    observation = tiny_models.batch(obs_steps=obs_steps).observation
    observation.state[..., 1] = float(tiny_models.statistics(spec)["state"]["mean"][1])
    return observation


def their_actions(policy, folder, observation, **options):
    """lerobot's answer to physical observations, with the processors in the folder."""
    before, after = processors(policy.config, folder)
    single = policy.config.n_obs_steps == 1
    given = {
        f"observation.images.{name}": (image[:, 0] if single else image) / 255
        for name, image in observation.images.items()
    }
    given["observation.state"] = observation.state[:, 0] if single else observation.state
    batch = before(given | {"task": list(observation.prompt)})
    batch = {key: value for key, value in batch.items() if key.startswith("observation")}
    policy.eval()
    with torch.no_grad():
        return after(policy.predict_action_chunk(batch, **options))


def agree(policy, folder, framework, observation, seed=5):
    theirs_options, ours_options = {}, {}
    if framework.head.stochastic:
        shape = (4, framework.horizon, framework.action_width)
        steps = getattr(framework.head, "num_steps", 1)
        torch.manual_seed(seed)
        noise = torch.stack([torch.randn(shape) for _ in range(steps)])
        is_diffusion = policy.config.type == "diffusion"
        theirs_options = {} if is_diffusion else {"noise": noise[0]}
        ours_options = {"noise": noise if is_diffusion else noise[0]}
    torch.manual_seed(seed)
    expected = their_actions(policy, folder, observation, **theirs_options)
    with torch.no_grad():
        found = framework.eval().sample_actions(observation, **ours_options)
    difference = relative(found, expected)
    print(policy.config.type, f"{difference:.1e}")
    assert difference <= 1e-4


def round_trip(policy, spec, tmp_path, obs_steps=1):
    """Theirs becomes ours, and ours theirs again; the same actions all the way."""
    from lerobot.configs.policies import PreTrainedConfig

    folder = saved(policy, spec, tmp_path / "theirs")
    checkpoint, framework = import_checkpoint(folder, tmp_path / "ours.ckpt")
    observation = observation_of(spec, obs_steps)
    agree(policy, folder, framework, observation)
    ours = Policy.from_checkpoint(checkpoint, device="cpu")
    agree(policy, folder, ours.framework, observation)

    back = export_checkpoint(checkpoint, tmp_path / "back")
    config = PreTrainedConfig.from_pretrained(back)
    again = type(policy).from_pretrained(back, config=config, strict=True)
    assert {n: tuple(p.shape) for n, p in again.state_dict().items()} == {
        n: tuple(p.shape) for n, p in policy.state_dict().items()
    }
    agree(again, back, framework, observation)
    return folder, checkpoint


def test_act(tmp_path):
    folder, _ = round_trip(test_act_parity.reference(), tiny_models.SPEC, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vision_backbone": "resnet34"}))
    with pytest.raises(LibrobotError, match=r"vision_backbone must be resnet18, found resnet34"):
        import_checkpoint(folder, tmp_path / "other.ckpt")


@pytest.mark.parametrize("changes", [{}, {"use_separate_rgb_encoder_per_camera": True, "horizon": 4}])
def test_diffusion(changes, tmp_path, monkeypatch):
    spec = test_diffusion_policy_parity.SPEC
    monkeypatch.setattr(tiny_models, "SPEC", spec)
    if "horizon" in changes:
        changes = changes | {"n_action_steps": 3}
    policy = test_diffusion_policy_parity.reference(**changes)
    round_trip(policy, spec, tmp_path, obs_steps=test_diffusion_policy_parity.OBS_STEPS)


def test_smolvla(tmp_path, monkeypatch, smolvla_reference):  # noqa: F811
    spec = test_smolvla_parity.SPEC
    monkeypatch.setattr(tiny_models, "SPEC", spec)
    ours = test_smolvla_parity.built()
    hub = tmp_path / "hub"  # what the hub's repository of the backbone would hold
    ours.vlm.model.config.save_pretrained(hub)
    ours.vlm.tokenizer.save_pretrained(hub)
    policy = smolvla_reference(ours, vlm_model_name=str(hub))
    round_trip(policy, spec, tmp_path)
