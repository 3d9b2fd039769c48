"""Octo's facts (Octo Model Team 2024 and its published code), each a test of its name."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import tiny_models
from librobot.config.build import build_framework
from librobot.errors import LibrobotError
from librobot.frameworks.octo import Octo
from librobot.heads.octo_ddpm import OctoDDPM
from librobot.nn.block_transformer import BlockTransformer, readout_mask
from librobot.nn.octo_tokens import Kept, StateTokens
from librobot.nn.score_network import FourierFeatures, ScoreNetwork
from librobot.policy import Policy
from librobot.types import Camera, Dim, RobotSpec

PUBLISHED = RobotSpec(
    name="widowx",
    cameras=(Camera("primary", 256, 256), Camera("wrist", 128, 128)),
    state=(),
    action=(*(Dim(f"a{i}") for i in range(6)), Dim("gripper", kind="gripper")),
    control_hz=5.0,
)
T5 = {
    "text_encoder": "t5",
    "text_pretrained": False,
    "text_config": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    "num_text_tokens": 32,  # a token for every byte
}


def published(name: str, **changes):
    """At the published size, on the meta device."""
    options = OmegaConf.to_container(tiny_models.load("framework", name)) | changes
    del options["_target_"]
    head = OctoDDPM(num_train_steps=20, num_steps=20, sampler="ancestral")
    with torch.device("meta"):
        return Octo(spec=PUBLISHED, vlm=None, head=head, optimizer=None, scheduler=None, **options)


def test_attention_mask_cell_by_cell():
    """Two task tokens, two of an observation, one readout, two steps."""
    drawn = [
        "xx......",
        "xx......",
        "xxxx....",
        "xxxx....",
        "xxxxx...",
        "xxxx.xx.",
        "xxxx.xx.",
        "xxxxxxxx",
    ]
    mask = readout_mask(num_task=2, num_seen=2, num_readouts=1, num_steps=2)
    assert ["".join("x" if cell else "." for cell in row) for row in mask.tolist()] == drawn


def test_several_readouts_of_a_step_read_each_other():
    mask = readout_mask(num_task=1, num_seen=1, num_readouts=2, num_steps=1)
    assert mask.tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, True, True],
        [True, True, True, True],
    ]


def test_readouts_are_read_by_nobody_else():
    torch.manual_seed(0)
    transformer = BlockTransformer(16, 2, 2, 32, 0.0).eval()
    task, seen, readouts = torch.randn(1, 3, 16), torch.randn(1, 2, 4, 16), torch.randn(1, 2, 1, 16)
    states = []
    transformer.norm.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    everyone = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 2, 4, dtype=torch.bool)
    transformer(task, everyone[0], seen, everyone[1], readouts)
    transformer(task, everyone[0], seen, everyone[1], readouts + 1)
    is_readout = torch.tensor([False] * 3 + ([False] * 4 + [True]) * 2)
    assert torch.equal(states[0][:, ~is_readout], states[1][:, ~is_readout])
    assert not torch.isclose(states[0][:, is_readout], states[1][:, is_readout]).all(dim=-1).any()


def test_tokens_that_are_not_real_are_not_read():
    torch.manual_seed(0)
    transformer = BlockTransformer(16, 2, 2, 32, 0.0).eval()
    task, seen, readouts = torch.randn(1, 3, 16), torch.randn(1, 2, 4, 16), torch.randn(1, 2, 1, 16)
    task_real, seen_real = torch.tensor([[True, False, False]]), torch.ones(1, 2, 4, dtype=torch.bool)
    seen_real[:, :, 2:] = False
    before = transformer(task, task_real, seen, seen_real, readouts)
    task[:, 1:], seen[:, :, 2:] = 9.0, -9.0
    assert torch.equal(transformer(task, task_real, seen, seen_real, readouts), before)


def test_token_counts():
    """16 language tokens; a primary picture of 256 pixels is 256 tokens, a wrist picture of 128 pixels 64."""
    octo = published("octo")
    assert octo.tokens.text.num_tokens == 16
    assert [camera.num_tokens for camera in octo.tokens.cameras] == [256, 64]
    assert octo.tokens.readouts.shape == (10, 1, 384)
    assert (octo.obs_steps, octo.horizon) == (2, 4)


@pytest.mark.parametrize(
    ("name", "millions"), [("octo", 27), ("octo_base", 93)], ids=["octo-small", "octo-base"]
)
def test_published_parameter_counts(name, millions):
    """ViT-S 27M, ViT-B 93M, the text encoder not counted (here T5's width of 768 enters the projection)."""
    octo = published(name)
    own = sum(p.numel() for n, p in octo.named_parameters() if not n.startswith("tokens.text.embedding"))
    text_proj = octo.tokens.text_proj.weight.shape
    own += (768 - text_proj[1]) * text_proj[0]
    assert round(own / 1e6) == millions
    kinds = {"octo": (384, 12, 6, 1536), "octo_base": (768, 12, 12, 3072)}[name]
    block = octo.transformer.blocks[0]
    assert (block.out_proj.out_features, len(octo.transformer.blocks), block.num_heads) == kinds[:3]
    assert block.mlp[0].out_features == kinds[3]


def test_the_goal_is_stacked_behind_each_picture():
    octo = tiny_models.build("octo").eval()
    assert all(camera.stem.convs[0].in_channels == 6 for camera in octo.tokens.cameras)
    observation = tiny_models.batch().observation
    black = {name: torch.zeros_like(image[:, 0]) for name, image in observation.images.items()}
    goal = {name: image[:, 0].flip(0) for name, image in observation.images.items()}
    noise = torch.zeros(4, octo.horizon, octo.action_width)
    with torch.inference_mode():
        without = octo.sample_actions(observation, noise=noise)
        none = octo.sample_actions(replace(observation, goal_images=black), noise=noise)
        given = octo.sample_actions(replace(observation, goal_images=goal), noise=noise)
    assert torch.equal(without, none), "an absent goal is black"
    assert not torch.allclose(without, given, atol=1e-4)
    assert not tiny_models.build("octo", goal_images=False).tokens.cameras[0].goal


def test_goal_or_instruction_is_kept_never_both():
    observation = tiny_models.batch(400).observation
    observation.goal_images = {"front": torch.full((400, 3, 32, 32), 7, dtype=torch.uint8)}
    observation.goal_images["front"][:100] = 0
    observation.prompt[300:] = [""] * 100
    all_of_it = Kept.of(observation)
    torch.manual_seed(0)
    kept = all_of_it.thinned(keep_goal=0.5, camera_dropout=0.0)
    assert not (kept.goal & kept.language).any()
    assert (kept.goal | kept.language).all(), "one of the two stays"
    assert kept.language[:100].all(), "no goal: the instruction stays"
    assert kept.goal[300:].all(), "no instruction: the goal stays"
    assert 70 < int(kept.goal[100:300].sum()) < 130
    assert all_of_it.thinned(1.0, 0.0).goal[100:].all()
    assert not all_of_it.thinned(0.0, 0.0).goal[100:300].any()


def test_camera_dropout_never_hides_a_samples_last_camera():
    observation = tiny_models.batch(200).observation
    observation.image_mask["wrist"][:50] = False
    torch.manual_seed(0)
    kept = Kept.of(observation).thinned(0.5, camera_dropout=0.9)
    left = torch.stack(list(kept.cameras.values()), dim=1)
    assert left.any(dim=1).all()
    assert not kept.cameras["wrist"][:50].any(), "an absent camera stays absent"
    assert left[50:].all(dim=1).float().mean() < 0.3
    assert Kept.of(observation).thinned(0.5, 0.0).cameras["front"].all()


def test_modalities_are_hidden_in_training_only():
    octo = tiny_models.build("octo", camera_dropout=1.0).eval()
    data = tiny_models.batch()
    noise, time = torch.randn(4, 6, 3), torch.full((4,), 0.5)
    everything = octo.compute_loss(data, noise=noise, time=time)[0]
    assert octo.compute_loss(data, noise=noise, time=time, kept=Kept.of(data.observation))[0] == everything
    octo.train()
    torch.manual_seed(0)
    assert octo.compute_loss(data, noise=noise, time=time)[0] != everything


def test_time_features():
    """cos, then sin, of 2 pi w times the level's number 0 to 19 (a head's time 1/20 to 1)."""
    features = FourierFeatures(4)
    with torch.no_grad():
        features.frequencies.copy_(torch.tensor([0.25, 0.1]))
    expected = torch.tensor([[-1.0, np.cos(0.4 * np.pi), 0.0, np.sin(0.4 * np.pi)]]).float()
    torch.testing.assert_close(features(torch.tensor([2.0])), expected, atol=1e-6, rtol=0)

    seen = []
    score = ScoreNetwork(8, horizon=2, action_dim=3, output_width=3, takes_noise=True, width=16)
    score.time_features.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    score(torch.zeros(2, 2, 3), torch.tensor([1 / 20, 1.0]), torch.zeros(2, 8))
    torch.testing.assert_close(seen[0], torch.tensor([0.0, 19.0]))


def test_score_network_sizes():
    """32 time features, 256 wide, 3 residual blocks, the chunk of 4 flattened."""
    score = published("octo").score
    assert score.time_features.frequencies.shape == (16,)
    assert score.enter.in_features == 32 + 384 + 4 * 7
    assert (score.enter.out_features, len(score.blocks), score.leave.out_features) == (256, 3, 4 * 7)


def test_the_gripper_is_left_as_it_is():
    spec = replace(tiny_models.SPEC, action=(Dim("x"), Dim("y"), Dim("gripper", kind="gripper")))
    plain = OmegaConf.create(tiny_models.config("octo"))
    raw = torch.tensor([[[3.0, 3.0, 1.0]]])
    for option, expected in ((False, 1.0), (True, 0.0)):
        plain.framework.normalize_gripper = option
        octo = build_framework(plain, spec)
        octo.normalizer.fit(tiny_models.statistics())  # means 0, .5, 1 and deviations 1, 2, 3
        normalized = octo.normalizer.normalize("action", raw)
        torch.testing.assert_close(normalized, torch.tensor([[[3.0, 1.25, expected]]]))


def test_wrist_cameras_have_pictures_of_their_own_size():
    octo = published("octo", wrist_cameras=["prim*"])
    assert [camera.size for camera in octo.tokens.cameras] == [128, 256]


def test_state_bins_are_quantiles_of_the_normal():
    tokens = StateTokens(1, 4, 8, 2)
    torch.testing.assert_close(tokens.edges, torch.tensor([-0.67449, 0.0, 0.67449]), atol=1e-4, rtol=0)
    state = torch.tensor([-9.0, -0.5, 0.5, 9.0])[:, None, None]
    expected = tokens.embedding.weight[:, None] + tokens.positions[:1, 0]
    torch.testing.assert_close(tokens(state)[:, 0], expected)


def test_state_bins_begin_as_a_dense_layer_over_one_hot_bins():
    """Flax's begins with variance 1 / bins. The same bin in two dimensions must be told apart by its position
    (0.02), which unit embeddings would drown: it would be a fiftieth of the token."""
    torch.manual_seed(0)
    tokens = StateTokens(num_dims=10, num_bins=256, width=96, max_steps=2)
    assert tokens.embedding.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    token = tokens(torch.zeros(1, 1, 10))[0, 0]
    own = token - token.mean(dim=0)
    assert 0.25 < (own.norm() / token.norm()).item() < 0.4


def test_the_published_model_reads_no_state():
    octo = tiny_models.build("octo").eval()
    observation, noise = tiny_models.batch().observation, torch.zeros(4, 6, 3)
    with torch.inference_mode():
        before = octo.sample_actions(observation, noise=noise)
        assert torch.equal(
            octo.sample_actions(replace(observation, state=observation.state + 1), noise=noise), before
        )


def test_fine_tuning_modes_are_presets_of_freeze():
    def trainable(**options) -> set[str]:
        octo = tiny_models.build("octo", pool="attention", **options)
        return {
            n.split(".")[0] + "." + n.split(".")[1] for n, p in octo.named_parameters() if p.requires_grad
        }

    everything = trainable(finetune="full")
    head = {name for name in everything if name.startswith(("score", "pool"))}
    assert trainable(finetune="head_only") == head
    assert trainable(finetune="head_mlp_only") == head - {"pool.probe", "pool.attention"}
    mean = tiny_models.build("octo", finetune="head_mlp_only")
    assert {n.split(".")[0] for n, p in mean.named_parameters() if p.requires_grad} == {"score"}


def test_t5_is_frozen_and_read_padding_included():
    octo = tiny_models.build("octo", **T5).train()
    assert not [n for n, p in octo.tokens.text.named_parameters() if p.requires_grad]
    inputs = octo.processor(
        ["open", "close the box"], tiny_models.batch(2).observation.images, torch.zeros(2, 1, 5)
    )
    assert inputs["input_ids"].shape == (2, 32)
    hidden, real = octo.tokens.text(inputs)
    assert real.all()
    alone, _ = octo.tokens.text({name: value[:1] for name, value in inputs.items()})
    torch.testing.assert_close(hidden[:1], alone)
    with pytest.warns(UserWarning, match="everything after 'word word word word word word wo' is cut"):
        octo.processor(["word " * 20], tiny_models.batch(1).observation.images, torch.zeros(1, 1, 5))
    tiny_models.fixed_loss(octo, tiny_models.batch()).backward()


def test_a_checkpoint_with_t5_needs_nothing_else(tmp_path):
    from librobot.nn.pretrained import skip_pretrained

    octo = tiny_models.build("octo", **T5).eval()
    checkpoint: dict = {}
    octo.on_save_checkpoint(checkpoint)
    files = checkpoint["librobot"]["backbone"]
    assert {"config.json", "tokenizer.json"} <= set(files)
    plain = OmegaConf.create(tiny_models.config("octo", **T5))
    plain.framework.text_config = None
    plain.framework.text_pretrained = True
    plain.framework.text_checkpoint = "no-such/model"
    with skip_pretrained(files):
        again = build_framework(plain, tiny_models.SPEC)
    again.load_weights(octo.state_dict())
    observation, noise = tiny_models.batch().observation, torch.zeros(4, 6, 3)
    with torch.inference_mode():
        expected = octo.sample_actions(observation, noise=noise)
        assert torch.equal(again.eval().sample_actions(observation, noise=noise), expected)


def test_over_a_backbone_the_readouts_read_its_hidden_states():
    octo = tiny_models.build("octo", backbone="vlm", state_tokens=True, obs_steps=2).eval()
    data = tiny_models.batch(obs_steps=2)
    data.observation.image_mask["wrist"][1] = False
    assert torch.isfinite(tiny_models.fixed_loss(octo, data))
    state = octo.normalized_state(data.observation)
    tokens = octo.embed(octo.prepare(data.observation), state, Kept.of(data.observation))
    assert tokens.seen.shape[2] == tiny_models.SPEC.state_dim
    assert not tokens.task_real[1].all()
    data.observation.goal_images = {"front": data.observation.images["front"][:, 0]}
    with pytest.raises(LibrobotError, match="backbone=vlm reads no goal pictures"):
        octo.sample_actions(data.observation)
    frozen = tiny_models.build("octo", backbone="vlm", finetune="head_only")
    assert {n.split(".")[0] for n, p in frozen.named_parameters() if p.requires_grad} == {"score"}


def test_a_narrow_robots_missing_dimensions_are_zeros_for_the_network():
    robots = (tiny_models.SPEC, tiny_models.NARROW)
    octo = tiny_models.build("octo", robots=robots).eval()
    seen = []
    octo.score.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    data = tiny_models.mixed_batch()
    octo.compute_loss(data)
    octo.sample_actions(data.observation)
    for x_t in seen:
        assert (x_t[data.embodiment == 1, :, tiny_models.NARROW.action_dim :] == 0).all()
        assert (x_t[data.embodiment == 0] != 0).all()


def test_a_policy_is_told_its_goal_by_a_picture_or_in_words():
    policy = Policy(tiny_models.build("octo"))
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    observation = {
        "images": {"wrist": np.zeros((24, 32, 3), np.uint8), "front": np.zeros((32, 32, 3), np.uint8)},
        "state": np.zeros(5, np.float32),
        "prompt": "",
        "seed": 3,
    }
    with pytest.raises(LibrobotError, match="prompt is empty"):
        policy.infer(observation)
    wanted = policy.infer(observation | {"goal_images": {"front": picture}})["actions"]
    other = policy.infer(observation | {"goal_images": {"front": 255 - picture}})["actions"]
    assert not np.allclose(wanted, other, atol=1e-4)
    with pytest.raises(LibrobotError, match=r"goal_images: .*did you mean 'front'"):
        policy.infer(observation | {"goal_images": {"fornt": picture}})
    blind = Policy(tiny_models.build("act"))
    with pytest.raises(LibrobotError, match="reads none"):
        blind.infer(observation | {"prompt": "open", "goal_images": {"front": picture}})


def test_policies_act_without_a_camera():
    policy = Policy(tiny_models.build("octo"))
    observation = {
        "images": {"wrist": None, "front": np.zeros((32, 32, 3), np.uint8)},
        "state": np.zeros(5, np.float32),
        "prompt": "open",
    }
    assert policy.infer(observation)["actions"].shape == (6, 3)


@pytest.mark.parametrize(
    "bad",
    [
        {"finetune": "tail"},
        {"backbone": "resnet"},
        {"text_encoder": "bert"},
        {"pool": "max"},
        {"keep_goal": 1.5},
        {"camera_dropout": -0.1},
        {"obs_steps": 11},
        {"image_size": 40},
        {"num_heads": 5},
        {"num_groups": 3},
        {"time_width": 7},
    ],
    ids=str,
)
def test_bad_arguments(bad):
    match = {"image_size": "pixels", "num_groups": "num_groups"}.get(next(iter(bad)), next(iter(bad)))
    with pytest.raises(LibrobotError, match=match):
        tiny_models.build("octo", **bad)
