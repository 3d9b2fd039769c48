"""The policy as evaluation and robots see it."""

import numpy as np
import pytest
import torch

import tiny_models
from librobot.errors import LibrobotError
from librobot.policy import Policy, read_checkpoint

SPEC = tiny_models.SPEC


@pytest.fixture(scope="module")
def policy():
    return Policy(tiny_models.build("pi0"), provenance={"renderer": "mujoco-rays"})


def observation(seed: int = 0, **changes):
    draw = np.random.default_rng(seed)
    images = {c.name: draw.integers(0, 256, (c.height, c.width, 3), dtype=np.uint8) for c in SPEC.cameras}
    state = draw.normal(size=SPEC.state_dim)
    return {"images": images, "state": state, "prompt": "reach the red cube", "seed": seed} | changes


def test_numpy_in_numpy_out(policy):
    actions = policy.infer(observation())["actions"]
    assert actions.shape == (policy.horizon, SPEC.action_dim)
    assert actions.dtype == np.float32
    assert np.isfinite(actions).all()
    assert (policy.obs_steps, policy.spec, policy.renderer) == (1, SPEC, "mujoco-rays")


def test_an_observation_with_a_seed_is_answered_alike_in_any_batch(policy):
    observations = [observation(seed) for seed in range(3)]
    together = policy.infer_batch(observations)
    for one, expected in zip(observations, together, strict=True):
        np.testing.assert_allclose(policy.infer(one)["actions"], expected["actions"], atol=1e-4)
    assert policy.infer_batch([]) == []
    other = policy.infer(observations[0] | {"seed": 17})["actions"]
    assert not np.allclose(other, together[0]["actions"], atol=1e-4)


def test_it_agrees_with_the_framework(policy):
    """Pictures arrive as (h, w, 3) and reach the network as (c, h, w), camera by camera."""
    given = observation()
    data = tiny_models.batch(1).observation
    data.images = {n: torch.from_numpy(x).permute(2, 0, 1)[None, None] for n, x in given["images"].items()}
    data.state = torch.from_numpy(given["state"].astype(np.float32))[None, None]
    data.prompt = [given["prompt"]]
    shape = (1, policy.horizon, policy.framework.action_width)
    noise = torch.randn(shape[1:], generator=torch.Generator().manual_seed(0))[None]
    expected = policy.framework.sample_actions(data, noise=noise)[0]
    np.testing.assert_allclose(policy.infer(given)["actions"], expected.numpy(), atol=1e-6)


def test_cameras_that_the_policy_does_not_use_are_ignored(policy):
    more = observation()
    more["images"]["roof"] = np.zeros((5, 5, 3), dtype=np.uint8)
    expected = policy.infer(observation())["actions"]
    np.testing.assert_array_equal(policy.infer(more)["actions"], expected)


def test_several_observation_steps():
    policy = Policy(tiny_models.build("act", obs_steps=2))
    draw = np.random.default_rng(0)
    images = {c.name: draw.integers(0, 256, (2, c.height, c.width, 3), dtype=np.uint8) for c in SPEC.cameras}
    given = {"images": images, "state": np.zeros((2, SPEC.state_dim)), "prompt": "open"}
    assert policy.infer(given)["actions"].shape == (policy.horizon, SPEC.action_dim)
    with pytest.raises(LibrobotError, match=r"\(2, 24, 32, 3\)"):
        policy.infer(observation())


FRONT = "front"
BAD = {
    "no prompt": ({"prompt": None}, "prompt must be text"),
    "empty prompt": ({"prompt": " "}, "prompt is empty"),
    "missing camera": ({"images": {"wrist": np.zeros((24, 32, 3), np.uint8)}}, "lacks camera 'front'"),
    "float image": ({"images": {FRONT: np.zeros((32, 32, 3))}}, "uint8"),
    "channels first": ({"images": {FRONT: np.zeros((3, 32, 32), np.uint8)}}, "channels last"),
    "wrong size": (
        {"images": {FRONT: np.zeros((64, 32, 3), np.uint8)}},
        r"\(32, 32, 3\), found \(64, 32, 3\)",
    ),
    "short state": ({"state": np.zeros(4)}, r"\(5,\) \(s0, s1, s2, s3, s4\), found \(4,\)"),
    "nan state": ({"state": np.full(5, np.nan)}, "finite"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_a_wrong_observation_teaches(policy, changes, message):
    wrong = observation()
    if FRONT in changes.get("images", {}):
        changes = {"images": wrong["images"] | changes["images"]}
    with pytest.raises(LibrobotError, match=message):
        policy.infer(wrong | changes)


def test_missing_keys_are_named(policy):
    with pytest.raises(LibrobotError, match="lacks 'state'"):
        policy.infer({"images": {}, "prompt": "open"})


def test_files_that_are_no_checkpoints(tmp_path):
    with pytest.raises(LibrobotError, match="no checkpoint at"):
        Policy.from_checkpoint(tmp_path / "absent.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(LibrobotError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "text.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(LibrobotError, match="not a checkpoint of librobot"):
        read_checkpoint(tmp_path / "other.ckpt")


def test_a_checkpoint_of_another_configuration_names_the_tensors(tmp_path):
    framework = tiny_models.build("act")
    checkpoint = {"state_dict": framework.state_dict()}
    framework.on_save_checkpoint(checkpoint)
    checkpoint["librobot"]["config"]["framework"]["latent_dim"] = 8
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(LibrobotError, match=r"latent_proj\.weight \(model \(32, 8\), checkpoint \(32, 4\)\)"):
        Policy.from_checkpoint(tmp_path / "a.ckpt")


def test_a_camera_that_is_hidden_on_purpose(policy):
    full = observation()
    hidden = policy.infer({**full, "images": {**full["images"], "front": None}, "seed": 1})["actions"]
    assert np.isfinite(hidden).all()
    assert not np.allclose(hidden, policy.infer({**full, "seed": 1})["actions"])


def test_a_policy_for_several_robots_wants_to_know_which(tmp_path):
    robots = (tiny_models.SPEC, tiny_models.NARROW)
    framework = tiny_models.build("act", robots=robots)
    checkpoint = {"state_dict": framework.state_dict()}
    framework.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "two.ckpt")
    policy = Policy.from_checkpoint(tmp_path / "two.ckpt", device="cpu")
    wide = observation() | {"robot": "test"}
    narrow = {
        "images": {"front": wide["images"]["front"]},
        "state": np.zeros(tiny_models.NARROW.state_dim, np.float32),
        "prompt": "open",
        "robot": "narrow",
    }
    one, other = policy.infer_batch([wide, narrow])
    assert (one["actions"].shape[1], other["actions"].shape[1]) == (3, 2)
    np.testing.assert_allclose(policy.infer(narrow)["actions"], other["actions"], atol=1e-4)
    with pytest.raises(LibrobotError, match=r"name one of .*'test', 'narrow'"):
        policy.infer(observation())
    with pytest.raises(LibrobotError, match="does not know robot 'narow'; did you mean 'narrow'"):
        policy.infer(narrow | {"robot": "narow"})
