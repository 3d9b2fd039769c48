"""GR00T's facts, release by release, and what it does beyond what every framework must hold."""

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

import tiny_models
from librobot.config.build import build, build_framework
from librobot.errors import LibrobotError
from librobot.frameworks.groot import FormalPrompt
from librobot.nn.vision_language_dit import Sights
from librobot.types import Batch, Camera, Dim, Observation, RobotSpec

WIDE = tiny_models.SPEC
NARROW = RobotSpec(
    name="narrow",
    cameras=(Camera("front", 32, 32),),
    state=tuple(Dim(f"s{i}") for i in range(2)),
    action=tuple(Dim(f"a{i}") for i in range(2)),
    control_hz=10.0,
)
PUBLISHED = {  # parameters of the hub's files
    "groot_n15": ("eagle25", 2_724_163_520),
    "groot_n16": ("eagle_block2a", 3_286_608_832),
    "groot_n17": ("cosmos_reason2", 3_455_180_928),
}
# N1.6's and N1.7's files hold the embedding a second time, as the output layer.
TIED_COPY = {"groot_n16": 151_680 * 2048, "groot_n17": 151_936 * 2048}


def noise_for(framework, size=4):
    draw = torch.Generator().manual_seed(5)
    return torch.randn(size, framework.horizon, framework.action_width, generator=draw)


def only(data: Batch, row: int) -> Batch:
    one = slice(row, row + 1)
    observation = data.observation
    return Batch(
        Observation(
            images={name: image[one] for name, image in observation.images.items()},
            image_mask={name: mask[one] for name, mask in observation.image_mask.items()},
            state=observation.state[one],
            prompt=observation.prompt[one],
            embodiment=None if observation.embodiment is None else observation.embodiment[one],
        ),
        data.actions[one],
        data.action_mask[one],
    )


@pytest.fixture
def mixed() -> Batch:
    """Samples of the wide and the narrow robot in turn; the narrow one lacks a camera and dimensions."""
    data = tiny_models.batch()
    data.observation.embodiment = torch.tensor([0, 1, 0, 1])
    data.observation.state[1::2, :, NARROW.state_dim :] = 0
    data.observation.image_mask["wrist"][1::2] = False
    data.actions[1::2, :, NARROW.action_dim :] = 0
    return data


@pytest.mark.parametrize("name", ["groot_n15", "groot_n16", "groot_n17"])
def test_a_mixed_batch_gives_each_sample_what_it_has_alone(name, mixed):
    """Robots of different dimensions in one batch: the loss and the actions of each kind by itself."""
    framework = tiny_models.build(name, robots=(WIDE, NARROW)).eval()
    noise, time = noise_for(framework), torch.tensor([0.1, 0.4, 0.6, 0.9])
    with torch.no_grad():
        loss, _ = framework.compute_loss(mixed, noise=noise, time=time)
        actions = framework.sample_actions(mixed.observation, noise=noise)
        losses = []
        for row in range(4):
            one = slice(row, row + 1)
            alone = only(mixed, row)
            losses.append(framework.compute_loss(alone, noise=noise[one], time=time[one])[0])
            again = framework.sample_actions(alone.observation, noise=noise[one])
            torch.testing.assert_close(again[0], actions[row], atol=1e-5, rtol=1e-5)
    numbers = mixed.action_mask.sum(1) * torch.tensor([3, 2, 3, 2])
    torch.testing.assert_close(loss, (torch.stack(losses) * numbers).sum() / numbers.sum())


def test_a_robot_uses_its_own_weights_and_statistics(mixed):
    """A policy of the narrow robot alone, with the second set of weights, does the same."""
    both = tiny_models.build("groot", robots=(WIDE, NARROW)).eval()
    plain = tiny_models.config("groot", slots=[1])
    one = build_framework(OmegaConf.create(plain), NARROW).eval()
    one.normalizer.fit(tiny_models.statistics(NARROW))
    own = one.normalizer.state_dict(prefix="normalizer.")
    one.load_weights({n: v for n, v in both.state_dict().items() if n not in own} | own)
    noise = noise_for(both)
    alone = only(mixed, 1).observation
    narrow = replace(
        alone, images={"front": alone.images["front"]}, image_mask={"front": alone.image_mask["front"]}
    )
    narrow = replace(narrow, state=alone.state[..., : NARROW.state_dim], embodiment=None)
    table = both.vlm.camera_embedding.weight
    with torch.no_grad():
        expected = both.sample_actions(alone, noise=noise[1:2])[..., : NARROW.action_dim]
        one.vlm.camera_embedding.weight[0] = table[1]  # its only camera is the other's second
        found = one.sample_actions(narrow, noise=noise[1:2])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_cross_attention_reads_text_and_pictures_in_turn():
    """N1.6 and N1.7, cell by cell: blocks 0, 4, ... the text, blocks 2, 6, ... the pictures, no padding."""
    dit = tiny_models.build("groot_n17", num_dit_layers=8).dit
    real = torch.tensor([[True, True, True, True, False], [True, False, True, True, True]])
    pictures = torch.tensor([[True, True, False, False, False]]).expand(2, -1)
    sights = Sights(torch.zeros(2, 5, 32), real & ~pictures, real & pictures)
    text = [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    seen = [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert [dit.mask(i, sights).int().tolist() for i in range(4)] == [text, seen, text, seen]
    assert [block.attention.k_proj.in_features for block in dit.blocks] == [32] * 8


def test_every_token_is_read_in_n15():
    dit = tiny_models.build("groot_n15").dit
    text, pictures = torch.tensor([[False, True, False]]), torch.tensor([[True, False, False]])
    assert dit.mask(1, Sights(torch.zeros(1, 3, 32), text, pictures)).tolist() == [[True, True, False]]
    assert dit.mask(1, Sights(torch.zeros(1, 3, 32), None, None)) is None


@pytest.mark.parametrize("name", ["groot_n15", "groot_n17"])
def test_padding_is_seen_only_where_asked(name):
    data = tiny_models.batch()
    with torch.no_grad():
        for see_padding in (False, True):
            framework = tiny_models.build(name, see_padding=see_padding).eval()
            noise = noise_for(framework)
            together = framework.sample_actions(data.observation, noise=noise)[1]
            alone = framework.sample_actions(only(data, 1).observation, noise=noise[1:2])[0]
            assert torch.allclose(together, alone, atol=1e-5) is not see_padding


@pytest.mark.parametrize(
    ("num_steps", "expected"), [(None, [0, 250, 500, 750]), (10, list(range(0, 1000, 100)))]
)
def test_four_euler_steps_from_noise_at_zero(num_steps, expected):
    """The DiT sees int(1000 t), with t = 0 for noise; GR00T takes four steps."""
    framework = tiny_models.build("groot").eval()
    steps = []
    framework.dit.register_forward_pre_hook(lambda module, args: steps.append(args[1].tolist()))
    with torch.no_grad():
        framework.sample_actions(tiny_models.batch().observation, num_steps=num_steps)
    assert steps == [[step] * 4 for step in expected]


def test_x_t_and_velocity_follow_gr00ts_direction():
    """x_t = (1 - t) noise + t actions, v = actions - noise."""
    framework = tiny_models.build("groot").eval()
    data, noise = tiny_models.batch(), noise_for(framework)
    data.action_mask[:] = True
    t = torch.tensor([0.2, 0.4, 0.6, 0.8])
    seen = {}

    def perfect(x_t, time, condition):
        seen["x_t"], seen["time"] = x_t, time
        return actions - noise

    actions = framework.pad(framework.normalized_actions(data), framework.action_width)
    real = framework.real_actions(data)
    mask = torch.nn.functional.pad(real, (0, framework.action_width - 3))
    loss = framework.head.loss(perfect, None, actions, mask, noise=noise, time=1 - t)
    torch.testing.assert_close(seen["time"], t)
    expected = (1 - t)[:, None, None] * noise + t[:, None, None] * actions
    torch.testing.assert_close(seen["x_t"][..., :3], expected[..., :3])
    torch.testing.assert_close(loss, torch.zeros(4), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("groot_n15", lambda beta: (0.999 - beta) / 0.999),
        ("groot_n16", lambda beta: (1 - beta) * 0.999),
        ("groot_n17", lambda beta: (1 - beta) * 0.999),
    ],
)
def test_training_times_are_the_published_draw(name, formula):
    head = tiny_models.build(name).head
    torch.manual_seed(2)
    drawn = 1 - head.draw_time(1000)
    torch.manual_seed(2)
    beta = torch.distributions.Beta(torch.tensor(1.5), torch.tensor(1.0)).sample((1000,))
    torch.testing.assert_close(drawn, formula(beta), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "tokens"), [("groot_n15", 1 + 32 + 6), ("groot_n17", 1 + 6)])
def test_the_suffix_is_state_future_tokens_actions(name, tokens):
    framework = tiny_models.build(name, num_future_tokens=32 if name == "groot_n15" else 0).eval()
    shapes = []
    framework.dit.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    with torch.no_grad():
        framework.sample_actions(tiny_models.batch().observation, num_steps=1)
    assert shapes == [(4, tokens, 32)]


def test_only_learned_positions_tell_actions_apart():
    framework = tiny_models.build("groot").eval()
    condition = framework.condition(tiny_models.batch().observation)
    x_t, time = noise_for(framework), torch.full((4,), 0.3)
    turned = x_t.flip(1)
    with torch.no_grad():
        plain = framework.denoise(x_t, time, condition)
        assert not torch.allclose(framework.denoise(turned, time, condition).flip(1), plain, atol=1e-5)
        framework.action_positions.zero_()
        plain = framework.denoise(x_t, time, condition)
        torch.testing.assert_close(
            framework.denoise(turned, time, condition).flip(1), plain, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("kind", ["learned", "zeros"])
def test_a_dropped_state_is_replaced(kind):
    framework = tiny_models.build("groot", state_dropout=0.5, dropped_state=kind)
    assert (framework.dropped_state is None) is (kind == "zeros")
    data, noise, time = tiny_models.batch(), noise_for(framework), torch.full((4,), 0.5)
    other = replace(data, observation=replace(data.observation, state=data.observation.state + 1))
    framework.eval()

    def loss(batch, drop):
        return framework.compute_loss(batch, noise=noise, time=time, drop_state=drop)[0]

    everyone, nobody = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    assert loss(data, everyone) == loss(other, everyone)
    assert loss(data, nobody) != loss(other, nobody)
    assert loss(data, None) == loss(data, nobody)  # it drops in training alone
    framework.train()
    state = torch.randn(1000, 1, framework.state_width)
    expected = 0.0 if framework.dropped_state is None else framework.dropped_state
    dropped = (framework.embed_state(state, 0)[:, 0] == expected).all(-1)
    assert 0.4 < dropped.float().mean() < 0.6


def test_numbers_beyond_the_statistics_are_clipped():
    data = tiny_models.batch()
    far = replace(data.observation, state=data.observation.state + 1e3)
    further = replace(far, state=far.state + 1)
    framework = tiny_models.build("groot", clip_normalized=True).eval()
    noise = noise_for(framework)
    with torch.no_grad():
        actions = framework.sample_actions(far, noise=10 * noise)
        assert torch.equal(framework.sample_actions(further, noise=10 * noise), actions)
    normalized = framework.normalizer.normalize("action", actions)
    assert normalized.abs().max() <= 1 + 1e-5
    assert not tiny_models.build("groot_n15").bounded


def test_instructions_in_lower_case_without_punctuation():
    assert FormalPrompt()(["Pick up the Cup, now!", "don't_stop"], torch.zeros(2, 1, 1)) == [
        "pick up the cup now",
        "dont_stop",
    ]
    assert tiny_models.build("groot").prompt_writer() is not None
    assert tiny_models.build("groot_n15").prompt_writer() is None


def test_the_backbone_and_its_keys_are_computed_once():
    framework = tiny_models.build("groot").eval()
    calls = []
    framework.vlm.register_forward_hook(lambda *_: calls.append("vlm"))
    framework.dit.blocks[0].attention.k_proj.register_forward_hook(lambda *_: calls.append("keys"))
    with torch.no_grad():
        framework.sample_actions(tiny_models.batch().observation, num_steps=8)
    assert calls == ["vlm", "keys"]


@pytest.mark.parametrize("vlm", ["tiny", "tiny_patches", "qwen3vl_tiny", "florence2_tiny", "eagle25_tiny"])
def test_backbones_say_which_tokens_are_pictures(vlm):
    """Other pictures change the embedded input there and nowhere else."""
    framework = tiny_models.build("groot", vlm=vlm).eval()
    observation = tiny_models.batch().observation
    observation.prompt = ["reach the red cube"] * 4
    with torch.no_grad():
        first = framework.vlm(framework.prepare(observation), layers=(0,))
        negative = {name: 255 - image for name, image in observation.images.items()}
        second = framework.vlm(framework.prepare(replace(observation, images=negative)), layers=(0,))
    changed = (first.hidden != second.hidden).any(-1)
    assert changed.any()
    assert torch.equal(changed & first.mask, first.pictures & first.mask)


def test_a_backbone_that_does_not_say_is_refused_where_it_matters():
    for name in ("groot_n15", "groot_n17"):
        framework = tiny_models.build(name).eval()
        framework.vlm.register_forward_hook(lambda module, args, out: replace(out, pictures=None))
        if name == "groot_n15":
            assert framework.sample_actions(tiny_models.batch().observation).isfinite().all()
            continue
        with pytest.raises(LibrobotError, match=r"framework\.cross_attention=all"):
            framework.sample_actions(tiny_models.batch().observation)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_action_dim": 2}, "max_action_dim must be at least 3"),
        ({"max_state_dim": 2}, "max_state_dim must be at least 5"),
        ({"max_positions": 3}, "max_positions must be at least 6"),
        ({"slots": [3]}, r"slots must hold one number from 0 to 2"),
        ({"slots": [0, 1]}, r"for each of 1 robots"),
        ({"cross_attention": "some"}, "cross_attention must be one of all, text_and_pictures"),
        ({"dropped_state": "ones"}, "dropped_state must be one of learned, zeros"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(LibrobotError, match=message):
        tiny_models.build("groot", **changes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_number_of_parameters_is_the_published_one(name):
    """On the meta device: no weights, no download."""
    vlm, published = PUBLISHED[name]
    plain = tiny_models.config(name)
    plain["framework"] = OmegaConf.to_container(tiny_models.load("framework", name))
    plain["vlm"] = OmegaConf.to_container(tiny_models.load("vlm", vlm)) | {"pretrained": False}
    with torch.device("meta"):
        framework = build_framework(OmegaConf.create(plain), WIDE)
    count = sum(parameter.numel() for parameter in framework.parameters())
    own = sum(p.numel() for n, p in framework.named_parameters() if not n.startswith("vlm."))
    assert count + TIED_COPY.get(name, 0) == published
    assert own == {"groot_n15": 1_068_806_144, "groot_n16": 1_418_624_000, "groot_n17": 1_620_515_968}[name]


@torch.no_grad()
def test_n16_reads_squares_of_patches():
    """Eagle-Block2A's features are torch's pixel_unshuffle of the tower's, through a norm and an MLP."""
    vlm = build(OmegaConf.create(tiny_models.node("vlm", "eagle_block2a_tiny")), "vlm").eval()
    pixels = torch.randn(2, 3, 56, 56)
    seen = vlm.model.model.vision_tower(pixels).last_hidden_state
    squares = torch.nn.functional.pixel_unshuffle(seen.mT.unflatten(2, (4, 4)), 2).flatten(2).mT
    expected = vlm.model.model.multi_modal_projector(squares)
    assert expected.shape == (2, vlm.tokens_per_picture(), 64)
    torch.testing.assert_close(torch.stack(vlm.model.features(pixels).pooler_output), expected)
    framework = tiny_models.build("groot_n16", vlm="eagle_block2a_tiny").eval()
    actions = framework.sample_actions(tiny_models.batch().observation, noise=noise_for(framework))
    assert actions.isfinite().all()
