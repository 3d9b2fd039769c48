"""OpenVLA and OpenVLA-OFT: one test for each published fact."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import tiny_models
from librobot.config.build import build_framework
from librobot.errors import LibrobotError
from librobot.frameworks.openvla import Question
from librobot.frameworks.picture_crop import PictureCrop
from librobot.nn.pictures import crop_area
from librobot.types import Dim


def with_gripper(name, **changes):
    spec = replace(
        tiny_models.SPEC, action=(Dim("x", kind="ee_position"), Dim("y"), Dim("g", kind="gripper"))
    )
    before, tiny_models.SPEC = tiny_models.SPEC, spec
    try:
        return tiny_models.build(name, **changes).eval()
    finally:
        tiny_models.SPEC = before


def test_the_prompt_is_in_small_letters_between_in_and_out():
    written = Question()(["Pick up the RED cube"], torch.zeros(1, 1, 2))
    assert written == ["In: What action should the robot take to pick up the red cube?\nOut:"]


def test_the_boundary_follows_the_prompt_and_is_not_learned():
    """Llama's token 29871 stands between "Out:" and the actions; tiny's boundary is a space."""
    framework = tiny_models.build("openvla")
    assert framework.decoder.start == (ord(" "),)
    assert framework.head.tokenizer.lead == ()


def test_actions_and_then_the_end_are_written():
    framework = tiny_models.build("openvla", horizon=1)
    ids, real = framework.head.tokenizer.encode(torch.zeros(1, 1, 3))
    assert ids.shape == (1, 4)
    assert ids[0, -1] == framework.vlm.vocabulary.end
    assert real.all()
    assert framework.head.tokenizer.around == (0, 1)


@pytest.mark.parametrize(
    ("action", "token"),
    [(-1.0, 31_999), (-0.999, 31_999), (-0.992, 31_998), (0.0, 31_872), (0.999, 31_745), (1.0, 31_744)],
)
def test_digitize_of_256_edges_counted_from_the_end_of_32000(action, token):
    """linspace(-1, 1, 256), digitize gives 1 to 256, id = 32000 - that."""
    tokenizer = tiny_models.build("openvla", horizon=1).head.tokenizer.inner
    edges = np.linspace(-1, 1, 256)
    assert 32_000 - np.digitize(action, edges) == token
    bin_ = tokenizer.encode(torch.full((1, 1, 3), action))[0][0, 0]
    assert 31_999 - int(bin_) == token


@pytest.mark.parametrize(("token", "centre"), [(31_999, 0), (31_872, 127), (31_745, 254), (31_744, 254)])
def test_decoding_takes_one_of_255_centres(token, centre):
    """clip(32000 - id - 1, 0, 254) names the centre of an interval between two edges."""
    edges = np.linspace(-1, 1, 256)
    expected = ((edges[:-1] + edges[1:]) / 2)[centre]
    tokenizer = tiny_models.build("openvla", horizon=1).head.tokenizer.inner
    decoded = tokenizer.decode(torch.full((1, 3), 31_999 - token), torch.ones(1, 3, dtype=torch.bool))
    assert decoded[0, 0, 0].item() == pytest.approx(expected, abs=1e-6)


def test_the_quantiles_are_the_ends_and_values_beyond_are_clipped():
    framework = tiny_models.build("openvla")
    q01, q99 = (tiny_models.statistics()["action"][name] for name in ("q01", "q99"))
    for beyond, end in ((q01 - 100, q01), (q99 + 100, q99)):
        given, at_end = (
            torch.from_numpy(np.broadcast_to(x, (1, framework.horizon, 3)).astype(np.float32).copy())
            for x in (beyond, end)
        )
        tokens = [
            framework.head.tokenizer.encode(framework.normalizer.normalize("action", x))[0]
            for x in (given, at_end)
        ]
        assert torch.equal(*tokens)


@pytest.mark.parametrize("name", ["openvla", "openvla_oft"])
def test_the_gripper_is_not_normalised(name):
    framework = with_gripper(name)
    assert framework.normalizer.action_offset[2] == 0
    assert framework.normalizer.action_scale[2] == 1
    assert framework.normalizer.action_scale[1] != 1


def test_the_state_is_not_seen():
    framework = tiny_models.build("openvla").eval()
    data = tiny_models.batch()
    other = replace(data, observation=replace(data.observation, state=data.observation.state + 9))
    assert tiny_models.fixed_loss(framework, data) == tiny_models.fixed_loss(framework, other)


def test_the_middle_nine_tenths_of_a_picture_count_at_evaluation():
    """sqrt(.9) of each side, resampled between corner pixels as TensorFlow's crop_and_resize does."""
    ramp = torch.linspace(0, 1, 11).expand(1, 1, 3, 11, 11)
    side = 0.9**0.5
    cut = crop_area(ramp, 0.9)
    torch.testing.assert_close(cut[0, 0, 0, 0], torch.linspace(0.5 - side / 2, 0.5 + side / 2, 11))
    torch.testing.assert_close(crop_area(ramp, 1.0), ramp)
    corner = crop_area(ramp, 0.9, torch.tensor([[1.0, -1.0]]))
    torch.testing.assert_close(corner[0, 0, 0, 0], torch.linspace(1 - side, 1, 11))


@pytest.mark.parametrize("name", ["openvla", "openvla_oft"])
def test_a_policy_acts_on_the_middle_of_what_it_was_trained_on(name, monkeypatch):
    """With `crop`, with the same crops from the augmentation, with whole pictures, and as one says."""
    seen = []

    def noted(crop, observation, *, training):
        seen.append((crop.training if training else crop.acting, training))
        return observation

    monkeypatch.setattr(PictureCrop, "__call__", noted)

    def shares(augmentation=None, **changes):
        plain = tiny_models.config(name, **changes) | {"augmentation": augmentation}
        policy = build_framework(OmegaConf.create(plain), tiny_models.SPEC)
        policy.normalizer.fit(tiny_models.statistics())
        seen.clear()
        data = tiny_models.batch(2, horizon=policy.horizon)
        policy.train().compute_loss(data)
        policy.eval().sample_actions(data.observation)
        assert [random for _, random in seen] == [True, False]
        return [area for area, _ in seen]

    def augmentation(**options):
        return {"random_crop": {"scale": [0.8, 0.9], **options}}

    assert shares() == [0.9, 0.9]
    assert shares(crop=None) == [None, None]
    assert shares(augmentation(), crop=None) == [None, pytest.approx(0.85)]
    assert shares(augmentation(scale=[0.8, 1.0]), crop=None) == [None, None]
    assert shares(augmentation(probability=0.5), crop=None) == [None, None]
    assert shares(acting_crop=None) == [0.9, None]
    assert shares(crop=None, acting_crop=0.7) == [None, 0.7]
    for wrong in (1.5, 0, "middle"):
        with pytest.raises(LibrobotError, match="acting_crop must be auto, null, or above 0 and at most 1"):
            shares(acting_crop=wrong)


def test_in_training_the_crop_is_anywhere_and_the_same_for_all_steps_of_a_sample():
    observation = tiny_models.batch(obs_steps=2).observation
    still = {n: image[:, :1].expand(-1, 2, -1, -1, -1) for n, image in observation.images.items()}
    observation = replace(observation, images=still)
    crop = PictureCrop(0.9, "auto")
    cut = crop(observation, training=True).images["front"]
    torch.testing.assert_close(cut[:, 0], cut[:, 1])
    assert not torch.allclose(cut, crop(observation, training=True).images["front"])
    middle = crop(observation, training=False).images["front"]
    assert torch.equal(middle, crop(observation, training=False).images["front"])
    assert PictureCrop(None, None)(observation, training=True) is observation


# OpenVLA-OFT.


def oft(head=None, **changes):
    return tiny_models.build("openvla_oft", head, **changes).eval()


def slots_seen(framework, monkeypatch, **given):
    """What `extend` gets for a chunk of a batch of four."""
    calls = []
    extend = framework.vlm.extend

    def recording(context, x, *, sees=None, real=None):
        calls.append((x, sees, real))
        return extend(context, x, sees=sees, real=real)

    monkeypatch.setattr(framework.vlm, "extend", recording)
    prefix = framework.prefix(tiny_models.batch().observation)
    noisy = torch.randn(4, framework.horizon, 3)
    framework.denoise(noisy, torch.full((4,), 0.5), prefix)
    return calls[-1]


@torch.inference_mode()
def test_slots_are_zeros_between_boundary_and_end_and_all_see_all(monkeypatch):
    framework = oft()
    x, sees, _ = slots_seen(framework, monkeypatch)
    num_slots = framework.horizon * 3
    assert x.shape[1] == 1 + 1 + num_slots + 1  # state, boundary, slots, end
    words = framework.vlm.vocabulary
    embed = framework.vlm.embed_tokens
    assert torch.equal(x[:, 1], embed(torch.full((4,), words.space)))
    assert (x[:, 2:-1] == 0).all()
    assert torch.equal(x[:, -1], embed(torch.full((4,), words.end)))
    assert sees.all()


@torch.inference_mode()
def test_each_slot_is_read_one_place_before_it(monkeypatch):
    """As the next token is predicted: the boundary speaks for the first slot, the end for none."""
    framework = oft()
    extend = framework.vlm.extend

    def numbered(context, x, **options):
        out = extend(context, x, **options)
        place = torch.arange(x.shape[1], dtype=torch.float32)
        return replace(out, hidden=place[None, :, None].expand(4, -1, x.shape[2]).clone())

    read = []
    framework.action_mlp.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    monkeypatch.setattr(framework.vlm, "extend", numbered)
    framework.denoise(
        torch.zeros(4, framework.horizon, 3),
        torch.zeros(4),
        framework.prefix(tiny_models.batch().observation),
    )
    places = read[0].reshape(4, framework.horizon, 3, -1)[0, :, :, 0].flatten()
    assert places.tolist() == list(range(1, 1 + framework.horizon * 3))  # state is 0, boundary 1


@torch.inference_mode()
def test_a_step_is_read_by_the_side_by_side_states_of_its_own_slots():
    framework = oft()
    width = framework.vlm.hidden_size
    assert framework.action_mlp[0][0].normalized_shape == (3 * width,)
    assert framework.action_mlp[-1].out_features == 3


@torch.inference_mode()
def test_with_noise_slots_are_its_numbers_and_the_step_is_a_token(monkeypatch):
    framework = oft("ddim")
    x, _, _ = slots_seen(framework, monkeypatch)
    assert x.shape[1] == 1 + 1 + 1 + framework.horizon * 3 + 1
    assert not (x[:, 3:-1] == 0).any(dim=-1).all()


def test_the_diffusion_step_counts_from_0_as_sines_then_cosines():
    framework = oft("ddim")
    steps = framework.head.num_train_steps
    first = framework.step_embedding(torch.tensor([1 / steps, 2 / steps]))
    half = framework.vlm.hidden_size // 2
    assert torch.allclose(first[0, :half], torch.zeros(half), atol=1e-5)
    assert torch.allclose(first[0, half:], torch.ones(half), atol=1e-5)
    assert first[1, 0] == pytest.approx(np.sin(1.0), abs=1e-4)
    assert first[1, half - 1] == pytest.approx(np.sin(1e-4), abs=1e-5)


def test_the_state_is_a_two_layer_gelu_mlps_token():
    framework = oft()
    first, activation, second = framework.proprio_proj
    assert (first.in_features, first.out_features) == (5, framework.vlm.hidden_size)
    assert isinstance(activation, torch.nn.GELU)
    assert second.out_features == framework.vlm.hidden_size
    assert oft(proprioception=False).proprio_proj is None


@torch.inference_mode()
def test_behind_runs_the_prefix_once_for_all_diffusion_steps():
    framework = oft("ddim")
    calls = []
    framework.vlm.register_forward_hook(lambda *_: calls.append(1))
    framework.sample_actions(tiny_models.batch().observation)
    assert len(calls) == 1


def test_joint_attention_needs_a_backbone_that_gives_its_embeddings():
    with pytest.raises(LibrobotError, match="attention=behind"):
        oft(attention="joint")
