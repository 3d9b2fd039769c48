"""What every framework must hold, with every head and every backbone."""

from dataclasses import replace

import lightning
import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

import tiny_models
from librobot.config.build import build_framework
from librobot.errors import LibrobotError
from librobot.heads.reflow import Reflow
from librobot.policy import Policy
from librobot.types import Batch, Observation

FRAMEWORKS = tiny_models.options("framework")
ALL_PAIRS = [(f, h) for f in FRAMEWORKS for h in tiny_models.options("head")]
PAIRS = [pair for pair in ALL_PAIRS if tiny_models.fits(*pair)]
REFUSED = [(f, h) for f, h in ALL_PAIRS if h in ("bins", "hybrid") and not tiny_models.fits(f, h)]
ALL_BACKBONES = [(f, v) for f in FRAMEWORKS for v in tiny_models.options("vlm")]
BACKBONES = [pair for pair in ALL_BACKBONES if tiny_models.runs_on(*pair)]
WITHOUT_CACHE = [pair for pair in ALL_BACKBONES if not tiny_models.runs_on(*pair)]


def everyday(framework: str, head: str) -> bool:
    """The fast tests take every framework with its own head, and every head with one framework."""
    if framework == "custom":
        return tiny_models.head_kind(head) != "denoiser" or head == tiny_models.natural_head(framework)
    return framework == "pi0" or head == tiny_models.natural_head(framework)


def marked(pairs: list[tuple[str, str]], fast) -> list:
    return [
        pytest.param(pair, id="-".join(pair), marks=[] if fast(*pair) else pytest.mark.slow) for pair in pairs
    ]


HEADS_TRIED = marked(PAIRS, everyday)
BACKBONES_TRIED = marked(BACKBONES, lambda framework, vlm: vlm == "tiny" or framework == "pi0")


@pytest.fixture(params=HEADS_TRIED)
def framework(request):
    name, head = request.param
    return tiny_models.build(name, head).eval()


@pytest.fixture(params=BACKBONES_TRIED)
def over_backbone(request):
    name, vlm = request.param
    return tiny_models.build(name, vlm=vlm, **tiny_models.reading_everything(name)).eval()


def noise_of(framework, size: int = 4) -> torch.Tensor:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(size, framework.horizon, framework.action_width, generator=draw)


def part_of(observation: Observation, rows: slice) -> Observation:
    return Observation(
        images={name: image[rows] for name, image in observation.images.items()},
        image_mask={name: mask[rows] for name, mask in observation.image_mask.items()},
        state=observation.state[rows],
        prompt=observation.prompt[rows],
        embodiment=None if observation.embodiment is None else observation.embodiment[rows],
    )


def reaction(framework, observation: Observation, noise: torch.Tensor) -> torch.Tensor:
    """What shows that something was seen: the sampled actions, or how likely given ones are where actions are
    tokens, as a small change rarely chooses another token."""
    if framework.head.network == "denoiser":
        return framework.sample_actions(observation, noise=noise)
    data = replace(tiny_models.batch(obs_steps=framework.obs_steps), observation=observation)
    rows = [
        replace(
            data,
            observation=part_of(observation, slice(row, row + 1)),
            actions=data.actions[row : row + 1],
            action_mask=data.action_mask[row : row + 1],
        )
        for row in range(observation.batch_size)
    ]
    return torch.stack([tiny_models.fixed_loss(framework, row) for row in rows])


@pytest.mark.filterwarnings("ignore")
def test_a_student_needs_a_teacher(tmp_path):
    plain = tiny_models.config("custom", "consistency")
    student = build_framework(OmegaConf.create(plain), tiny_models.SPEC)
    with pytest.raises(LibrobotError, match=r"head\.teacher=CHECKPOINT"):
        fit(student, 1, tmp_path)


def check_gradients(framework) -> None:
    framework.train()
    loss = tiny_models.fixed_loss(framework, tiny_models.batch())
    assert torch.isfinite(loss)
    loss.backward()
    trainable = {n: p for n, p in framework.named_parameters() if p.requires_grad}
    assert [n for n, p in trainable.items() if p.grad is None] == []
    assert [n for n, p in trainable.items() if not p.grad.isfinite().all()] == []
    # A few are zero by construction: attention among identical tokens, values of zero.
    moved = [n for n, p in trainable.items() if p.grad.abs().sum() > 0]
    assert len(moved) >= 0.9 * len(trainable), sorted(set(trainable) - set(moved))


@pytest.mark.parametrize(("name", "head"), REFUSED, ids=["-".join(pair) for pair in REFUSED])
def test_a_head_that_needs_another_network_says_so(name, head):
    with pytest.raises(LibrobotError, match=r"needs a .*; take framework=custom network=(causal|pair)"):
        tiny_models.build(name, head)


@pytest.mark.parametrize(("name", "vlm"), WITHOUT_CACHE, ids=["-".join(pair) for pair in WITHOUT_CACHE])
def test_a_backbone_without_a_cache_is_refused_where_one_is_needed(name, vlm):
    with pytest.raises(LibrobotError, match=r"cache.* vlm="):
        tiny_models.build(name, vlm=vlm)


def test_finite_loss_and_a_gradient_for_every_trainable_parameter(framework):
    check_gradients(framework)


def test_gradients_over_every_backbone(over_backbone):
    check_gradients(over_backbone)


def test_masked_steps_do_not_change_the_loss(framework):
    data = tiny_models.batch()
    before = tiny_models.fixed_loss(framework, data)
    changed = data.actions.clone()
    changed[~data.action_mask] = 1e3
    assert tiny_models.fixed_loss(framework, replace(data, actions=changed)) == before
    changed[:, 0] += 1.0
    if isinstance(framework.head, Reflow):
        return  # its targets are the teacher's
    assert tiny_models.fixed_loss(framework, replace(data, actions=changed)) != before


def test_sampling_is_deterministic_given_noise(framework):
    observation, noise = tiny_models.batch().observation, noise_of(framework)
    with torch.inference_mode():
        first = framework.sample_actions(observation, noise=noise)
        torch.manual_seed(99)
        assert torch.equal(framework.sample_actions(observation, noise=noise), first)
        if framework.head.stochastic:
            assert not torch.equal(framework.sample_actions(observation, noise=noise + 1), first)
    assert first.shape == (4, tiny_models.HORIZON, tiny_models.SPEC.action_dim)
    assert first.dtype == torch.float32


def test_state_dict_round_trip(framework):
    other = tiny_models.build(*request_of(framework), seed=1).eval()
    observation, noise = tiny_models.batch().observation, noise_of(framework)
    with torch.inference_mode():
        expected = framework.sample_actions(observation, noise=noise)
        # Samples may be the head's bounds alone, whatever an untrained network says; the loss is not.
        data = tiny_models.batch()
        assert tiny_models.fixed_loss(other, data) != tiny_models.fixed_loss(framework, data)
        other.head.restore(framework.head.files())
        other.load_weights(framework.state_dict())
        assert torch.equal(other.sample_actions(observation, noise=noise), expected)


def request_of(framework) -> tuple[str, str]:
    """The options that built this framework, read back from the configuration attached to it."""
    for name, head in PAIRS:
        plain = tiny_models.config(name, head)
        if plain == framework.run_config:
            return name, head
    raise AssertionError("no options give this configuration")


def test_camera_order_does_not_matter(over_backbone):
    data, noise = tiny_models.batch(), noise_of(over_backbone)
    observation = data.observation
    turned = replace(observation, images=dict(reversed(observation.images.items())))
    swapped = dict(zip(observation.images, reversed(observation.images.values()), strict=True))
    with torch.inference_mode():
        before = reaction(over_backbone, observation, noise)
        assert torch.equal(reaction(over_backbone, turned, noise), before)
        other = reaction(over_backbone, replace(observation, images=swapped), noise)
        assert not torch.equal(other, before), "the cameras are not told apart"


def test_an_absent_camera_is_not_looked_at(over_backbone):
    observation, noise = tiny_models.batch().observation, noise_of(over_backbone)
    absent = {name: mask.clone() for name, mask in observation.image_mask.items()}
    absent["front"][:] = False
    blank = dict(observation.images) | {"front": torch.zeros_like(observation.images["front"])}
    with torch.inference_mode():
        seen = reaction(over_backbone, replace(observation, image_mask=absent), noise)
        same = reaction(over_backbone, replace(observation, image_mask=absent, images=blank), noise)
        present = reaction(over_backbone, observation, noise)
    assert torch.equal(seen, same)
    assert not torch.equal(seen, present)


def test_pictures_state_and_instruction_all_count(over_backbone):
    observation, noise = tiny_models.batch().observation, noise_of(over_backbone)
    changes = {
        "images": {name: 255 - image for name, image in observation.images.items()},
        "state": observation.state + 1,
        "prompt": ["push the green cube"] * 4,
    }
    if not over_backbone.reads_state:
        del changes["state"]
    with torch.inference_mode():
        before = reaction(over_backbone, observation, noise)
        for field, value in changes.items():
            after = reaction(over_backbone, replace(observation, **{field: value}), noise)
            assert not torch.allclose(after, before, atol=1e-6), f"{field} has no effect"


def test_a_sample_does_not_see_its_neighbours(over_backbone):
    observation, noise = tiny_models.batch().observation, noise_of(over_backbone)
    with torch.inference_mode():
        together = over_backbone.sample_actions(observation, noise=noise)
        for row in range(4):
            alone = over_backbone.sample_actions(
                part_of(observation, slice(row, row + 1)), noise=noise[row : row + 1]
            )
            # Twenty denoising steps that each divide by a small number enlarge rounding errors (Octo's).
            torch.testing.assert_close(alone[0], together[row], atol=1e-4, rtol=1e-4)


def test_several_observation_steps(framework):
    name, head = request_of(framework)
    framework = tiny_models.build(name, head, obs_steps=2).eval()
    data = tiny_models.batch(obs_steps=2)
    assert torch.isfinite(tiny_models.fixed_loss(framework, data))
    noise = noise_of(framework)
    images = {name: image.flip(1) for name, image in data.observation.images.items()}
    turned = replace(data.observation, images=images)
    with torch.inference_mode():
        if framework.head.network == "decoder":  # a small change rarely chooses another token
            before, after = (
                tiny_models.fixed_loss(framework, replace(data, observation=o))
                for o in (data.observation, turned)
            )
        else:
            before = framework.sample_actions(data.observation, noise=noise)
            after = framework.sample_actions(turned, noise=noise)
    assert not torch.allclose(before, after, atol=1e-6, rtol=1e-6), "the order of the steps has no effect"


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_robots_of_different_sizes_in_one_batch(name):
    """Each sample has its own robot's statistics, cameras and dimensions, whatever else is in the batch."""
    robots = (tiny_models.SPEC, tiny_models.NARROW)
    if not tiny_models.framework_class(name).several_robots:
        with pytest.raises(LibrobotError, match="found 2 robots; take framework=pi0"):
            tiny_models.build(name, robots=robots)
        return
    framework = tiny_models.build(name, robots=robots).eval()
    widened = [tiny_models.statistics(robot) for robot in robots]
    for key in ("mean", "min", "max", "q01", "q99"):
        widened[1]["action"][key] = widened[1]["action"][key] + 100.0
    framework.normalizer.fit(widened, force=True)
    data, noise = tiny_models.mixed_batch(), noise_of(framework)
    with torch.inference_mode():
        together = framework.sample_actions(data.observation, noise=noise)
        for row in range(4):
            alone = framework.sample_actions(
                part_of(data.observation, slice(row, row + 1)), noise=noise[row : row + 1]
            )
            torch.testing.assert_close(alone[0], together[row], atol=1e-4, rtol=1e-4)
        assert (together[data.embodiment == 1, :, :2].mean() - 100).abs() < 50, "another robot's statistics"
        before = tiny_models.fixed_loss(framework, data)
        data.actions[1, :, 2:] += 5.0  # a dimension that the narrow robot has not
        after = tiny_models.fixed_loss(framework, data)
    assert torch.isfinite(before)
    assert after == before

    wrong = replace(data.observation, embodiment=torch.tensor([0, 1, 2, 0]))
    with pytest.raises(LibrobotError, match=r"knows 2 robots \(test, narrow\), found embodiments \[0, 1, 2"):
        framework.sample_actions(wrong, noise=noise)


class OneBatch(torch.utils.data.Dataset):
    """The same batch again and again: resuming inside an epoch is the data module's to test."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Batch:
        return tiny_models.batch()


class Recorder(lightning.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].item())


def fit(framework, steps: int, folder, ckpt=None):
    recorder = Recorder()
    trainer = lightning.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        callbacks=[recorder],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    loader = DataLoader(OneBatch(), batch_size=None)
    trainer.fit(framework, loader, ckpt_path=ckpt, weights_only=True)
    return recorder.losses, trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pair", HEADS_TRIED)
def test_resumed_training_and_reloaded_policy(pair, tmp_path):
    """Two steps and two resumed ones equal four straight ones, in a checkpoint that is only plain values."""
    name, head = pair
    lightning.seed_everything(3, verbose=False)
    straight, trainer = fit(tiny_models.build(name, head), 4, tmp_path)

    lightning.seed_everything(3, verbose=False)
    first, trainer = fit(tiny_models.build(name, head), 2, tmp_path)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    lightning.seed_everything(3, verbose=False)
    second, trainer = fit(tiny_models.build(name, head), 4, tmp_path, ckpt=tmp_path / "two.ckpt")
    assert first + second == straight

    trainer.save_checkpoint(tmp_path / "four.ckpt")
    checkpoint = torch.load(tmp_path / "four.ckpt", weights_only=True)
    assert set(checkpoint["librobot"]) == {
        "version",
        "config",
        "spec",
        "embodiments",
        "provenance",
        "backbone",
        "head",
    }

    trained = trainer.lightning_module.eval()
    policy = Policy.from_checkpoint(tmp_path / "four.ckpt", device="cpu")
    assert (policy.horizon, policy.spec) == (tiny_models.HORIZON, tiny_models.SPEC)
    assert policy.renderer == "test-renderer"
    observation, noise = tiny_models.batch().observation, noise_of(trained)
    with torch.inference_mode():
        expected = trained.sample_actions(observation, noise=noise)
        assert torch.equal(policy.framework.sample_actions(observation, noise=noise), expected)
