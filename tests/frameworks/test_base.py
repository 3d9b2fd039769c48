"""What the base class owns: optimiser groups, freezing, checkpoints, checks, precision."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import tiny_models
from librobot.errors import LibrobotError
from librobot.frameworks.checkpoint import plain
from librobot.frameworks.randomness import step_seed


class OneBatch(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        return tiny_models.batch()


def trainer(folder, **changes) -> lightning.Trainer:
    options = {"max_steps": 2, "max_epochs": -1, "accelerator": "cpu", "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return lightning.Trainer(**options | quiet | changes, default_root_dir=folder)


def optimizer_of(framework, folder):
    made = trainer(folder)
    made.fit(framework, DataLoader(OneBatch(), batch_size=None))
    return made.optimizers[0]


@pytest.mark.filterwarnings("ignore")
def test_parameter_groups(tmp_path):
    framework = tiny_models.build(
        "pi0", lr_multipliers={"vlm": 0.1, "vlm.towers": 0.5}, freeze=["vlm.sentence"]
    )
    names = {id(p): n for n, p in framework.named_parameters()}
    rate, decays = {}, {}
    for group in optimizer_of(framework, tmp_path).param_groups:
        for parameter in group["params"]:
            rate[names[id(parameter)]] = group["lr"]
            decays[names[id(parameter)]] = group["weight_decay"] > 0
    assert set(rate) == {n for n, p in framework.named_parameters() if p.requires_grad}
    assert rate["action_out_proj.weight"] == pytest.approx(1e-3)
    assert rate["vlm.blocks.0.mlp.gate.weight"] == pytest.approx(1e-4)
    assert rate["vlm.towers.0.stem.weight"] == pytest.approx(5e-4)
    assert not [n for n in rate if n.startswith("vlm.sentence")]
    assert decays["vlm.towers.0.stem.weight"]
    assert decays["expert.layers.0.mlp.gate.weight"]
    for spared in ("vlm.text.table.weight", "expert.layers.0.mlp_norm.plain.scale", "action_out_proj.bias"):
        assert not decays[spared], spared


@pytest.mark.filterwarnings("ignore")
def test_validation_is_logged_and_repeats_itself(tmp_path):
    framework = tiny_models.build("act")
    made = trainer(tmp_path)
    loader = DataLoader(OneBatch(), batch_size=None)
    first = made.validate(framework, loader, verbose=False)[0]
    torch.manual_seed(99)
    assert made.validate(framework, loader, verbose=False)[0] == first
    assert {"val/loss", "val/action_error", "val/kl"} <= set(first)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", tiny_models.options("framework"))
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_trains_in_bfloat16(name, precision, tmp_path):
    framework = tiny_models.build(name)
    before = {n: p.detach().clone() for n, p in framework.named_parameters() if p.requires_grad}
    made = trainer(tmp_path, precision=precision)
    loader = DataLoader(OneBatch(), batch_size=None)
    made.fit(framework, loader, loader)
    assert torch.isfinite(made.callback_metrics["train/loss"])
    assert torch.isfinite(made.callback_metrics["val/action_error"])
    now = dict(framework.named_parameters())
    moved = [n for n, p in before.items() if not torch.equal(now[n].float(), p)]
    assert len(moved) > len(before) / 2


def test_freezing_an_unknown_part_names_the_nearest():
    with pytest.raises(LibrobotError, match=r"no part 'vlm.towrs'.*did you mean 'vlm.towers'"):
        tiny_models.build("pi0", freeze=["vlm.towrs"])


def test_freezing_a_pattern():
    framework = tiny_models.build("act", freeze=["encoder.layers.*.attention.*"])
    frozen = {n for n, p in framework.named_parameters() if not p.requires_grad}
    assert frozen == {
        n for n, _ in framework.named_parameters() if n.startswith("encoder.layers") and ".attention." in n
    }


def test_weights_that_do_not_fit_are_named():
    framework = tiny_models.build("act")
    state = framework.state_dict()
    state["surprise"] = torch.zeros(1)
    state["queries.weight"] = torch.zeros(2, 2)
    state.pop("latent_proj.bias")
    with pytest.raises(LibrobotError) as error:
        framework.load_weights(state)
    for part in ("latent_proj.bias", "surprise", "queries.weight", "(6, 32)", "(2, 2)"):
        assert part in str(error.value)


def test_a_checkpoint_takes_plain_values_only():
    assert plain({"a": (1, np.float64(2.5)), "b": None}, "config") == {"a": [1, 2.5], "b": None}
    with pytest.raises(LibrobotError, match=r"config\.a\[0\].*ndarray"):
        plain({"a": [np.zeros(2)]}, "config")


def test_a_missing_camera_is_named():
    framework, observation = tiny_models.build("act"), tiny_models.batch().observation
    images = {"frnt" if name == "front" else name: image for name, image in observation.images.items()}
    with pytest.raises(LibrobotError, match=r"'front'.*did you mean 'frnt'"):
        framework.prepare(replace(observation, images=images))


def test_wrong_shapes_say_what_was_expected():
    framework, data = tiny_models.build("act"), tiny_models.batch()
    with pytest.raises(LibrobotError, match=r"\(b, 1, 5\).*\(4, 1, 4\)"):
        framework.compute_loss(
            replace(data, observation=replace(data.observation, state=data.observation.state[..., :4]))
        )
    with pytest.raises(LibrobotError, match=r"\(b, 6, 3\).*\(4, 5, 3\)"):
        framework.compute_loss(replace(data, actions=data.actions[:, :5]))


def test_an_unfitted_normalizer_refuses():
    framework = tiny_models.build("act")
    framework.normalizer.fitted.fill_(False)
    framework.normalizer._known_fitted = False
    with pytest.raises(LibrobotError, match="statistics"):
        framework.compute_loss(tiny_models.batch())


def test_what_the_first_process_fitted_counts_in_all():
    """Tokens that data define are floats of each process's own: the first one's go to the others."""
    first, other = (tiny_models.build("custom", "vq", seed=seed) for seed in (0, 1))
    assert first.head.files() != other.head.files()
    strategy = SimpleNamespace(broadcast=lambda files: first.head.files())
    for world_size, expected in ((1, other.head.files()), (2, first.head.files())):
        other._trainer = SimpleNamespace(world_size=world_size, strategy=strategy)
        other.on_fit_start()
        assert other.head.files() == expected


def test_step_seeds_differ():
    seeds = {step_seed(s, b, r) for s in range(3) for b in range(20) for r in range(3)}
    assert len(seeds) == 180
    assert step_seed(1, 2, 3) == step_seed(1, 2, 3)


@pytest.mark.filterwarnings("ignore")
def test_a_schedule_that_needs_an_end_says_so(tmp_path):
    from librobot.training.schedules import cosine

    framework = tiny_models.build("act")
    framework._scheduler = functools.partial(cosine)
    endless = trainer(tmp_path, max_steps=-1, max_time="00:00:00:05")
    with pytest.raises(LibrobotError, match="max_steps"):
        endless.fit(framework, DataLoader(OneBatch(), batch_size=None))
