"""The options of `augmentation=`: what each changes, its bounds, and that draws repeat."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from omegaconf import OmegaConf

from librobot.config.build import build
from librobot.config.compose import compose
from librobot.data.augmentations.base import Rewriting
from librobot.data.augmentations.blur import Blur
from librobot.data.augmentations.camera_dropout import CameraDropout
from librobot.data.augmentations.cutout import Cutout
from librobot.data.augmentations.noise import PixelNoise
from librobot.data.augmentations.paraphrase import Paraphrase
from librobot.data.augmentations.random_crop import RandomCrop
from librobot.data.augmentations.vector_noise import ActionNoise, StateNoise
from librobot.data.datamodule import DataModule
from librobot.errors import LibrobotError
from librobot.types import Batch, Camera, Dim, Observation, RobotSpec

OPTIONS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf/augmentation").glob("*.yaml"))
PICTURES = {
    "random_crop": RandomCrop(scale=(0.3, 0.6), rotate=20),
    "blur": Blur(sigma=(1, 2), probability=1),
    "noise": PixelNoise(std=(0.1, 0.2), probability=1),
    "cutout": Cutout(probability=1),
}
SPEC = RobotSpec(
    name="arm",
    cameras=(Camera("front", 20, 30), Camera("wrist", 20, 30)),
    state=(Dim("x"), Dim("y"), Dim("grip", kind="gripper")),
    action=(Dim("x"), Dim("grip", kind="gripper")),
    control_hz=10,
)


def make_batch(num: int = 8, steps: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (num, 1, 3, 5, 6), generator=generator).float().flatten(0, 1)
    still = torch.nn.functional.interpolate(coarse, (20, 30), mode="bilinear").unflatten(0, (num, 1))
    images = still.round().to(torch.uint8).expand(-1, steps, -1, -1, -1).contiguous()
    return Batch(
        observation=Observation(
            images={"front": images, "wrist": images.clone()},
            image_mask={name: torch.ones(num, dtype=torch.bool) for name in ("front", "wrist")},
            state=torch.randn(num, steps, 3, generator=generator),
            prompt=["pick up the cube"] * num,
        ),
        actions=torch.randn(num, 5, 2, generator=generator),
        action_mask=torch.ones(num, 5, dtype=torch.bool),
        extra={"rows": np.arange(num)},
    )


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_change_alike_over_a_window_and_the_same_for_a_seed(name):
    batch = make_batch()
    before = batch.observation.images["front"].clone()
    first, again, other = (PICTURES[name](batch, seed=(s,)).observation for s in (1, 1, 2))
    for camera in ("front", "wrist"):
        found = first.images[camera]
        assert found.dtype == torch.uint8
        assert found.shape == before.shape
        assert torch.equal(found, again.images[camera])
        assert not torch.equal(found, other.images[camera])
        assert (found == found[:, :1]).all()
    assert not torch.equal(first.images["front"], first.images["wrist"])
    assert len({image.numpy().tobytes() for image in first.images["front"][:, 0]}) == 8
    assert torch.equal(batch.observation.images["front"], before)
    assert first.state is batch.observation.state


@pytest.mark.parametrize("name", PICTURES)
def test_some_samples_and_some_cameras(name):
    batch = make_batch(num=64, steps=1)
    kind: Any = type(PICTURES[name])
    given = {"random_crop": {"scale": (0.3, 0.3)}, "noise": {"std": (0.2, 0.2)}}.get(name, {})
    found = kind(probability=0.5, cameras=["wrist"], **given)(batch, seed=(3,)).observation.images
    assert torch.equal(found["front"], batch.observation.images["front"])
    changed = (found["wrist"] != batch.observation.images["wrist"]).flatten(1).any(dim=1)
    assert 20 < int(changed.sum()) < 44
    assert (
        kind(probability=0.0)(batch, seed=(3,))
        .observation.images["front"]
        .equal(batch.observation.images["front"])
    )


def test_a_crop_is_a_part_of_the_picture():
    """Of a picture that is its own coordinates: the crop's area is the share that was asked for."""
    batch = make_batch(num=32, steps=1)
    across = torch.linspace(0, 255, 30).expand(20, 30)
    down = torch.linspace(0, 255, 20)[:, None].expand(20, 30)
    picture = torch.stack((across, down, across)).round().to(torch.uint8).expand(32, 1, 3, 20, 30)
    batch = replace(batch, observation=replace(batch.observation, images={"front": picture}))
    found = RandomCrop(scale=(0.25, 0.25))(batch, seed=(1,)).observation.images["front"][:, 0].float()
    # Across 29 of the crop's 30 pixels, half of the picture's width.
    steps = (found[:, 0, :, -1] - found[:, 0, :, 0]).mean(dim=1) / 255
    torch.testing.assert_close(steps, torch.full((32,), 0.5), atol=0.02, rtol=0)
    assert found[:, 0].min() < 20
    assert found[:, 0].max() > 235
    whole = RandomCrop(scale=(1.0, 1.0))(batch, seed=(1,)).observation.images["front"]
    assert (whole.int() - picture.int()).abs().max() <= 1


def test_a_crop_can_turn():
    images = torch.zeros(1, 1, 3, 21, 21, dtype=torch.uint8)
    images[..., 10, :] = 255  # a line across
    crop = RandomCrop(scale=(1.0, 1.0), rotate=90)
    batch = replace(make_batch(1), observation=replace(make_batch(1).observation, images={"front": images}))
    angles = []
    for seed in range(30):
        found = crop(batch, seed=(seed,)).observation.images["front"][0, 0, 0].float()
        rows, columns = torch.nonzero(found > 100, as_tuple=True)
        spread = torch.stack((rows - 10, columns - 10)).float()
        angles.append(float(spread[0].abs().max()))
    assert max(angles) > 8
    assert min(angles) < 3


def test_blur_is_a_gaussian():
    images = torch.zeros(1, 1, 3, 41, 41, dtype=torch.uint8)
    images[..., 20, 20] = 255
    one = Blur(sigma=(2.0, 2.0), probability=1.0).blur(images, torch.Generator().manual_seed(0))
    assert int(one[0, 0, 0, 20, 20]) == round(255 / (2 * np.pi * 4))
    assert torch.equal(one, one.flip(-1))
    assert torch.equal(one[0, 0, 0], one[0, 0, 0].T)


def test_noise_is_as_strong_as_asked():
    images = torch.full((4, 2, 3, 64, 64), 128, dtype=torch.uint8)
    found = PixelNoise(std=(0.05, 0.05), probability=1.0).disturb(images, torch.Generator().manual_seed(0))
    assert (found.float() - 128).std() == pytest.approx(0.05 * 255, rel=0.02)


@pytest.mark.parametrize(("fill", "value"), [("black", 0), ("grey", 127)])
def test_cutout_covers_a_rectangle(fill, value):
    images = torch.full((16, 1, 3, 20, 40), 200, dtype=torch.uint8)
    found = Cutout(size=(0.5, 0.5), fill=fill, probability=1.0).cut(images, torch.Generator().manual_seed(0))
    hidden = found[:, 0, 0] == value
    assert hidden.flatten(1).sum(dim=1).tolist() == [10 * 20] * 16
    for one in hidden:
        rows, columns = one.nonzero(as_tuple=True)
        assert (int(rows.max() - rows.min()), int(columns.max() - columns.min())) == (9, 19)


def test_a_camera_fails_as_often_as_asked_and_never_the_last():
    batch = make_batch(num=4000, steps=1)
    lacking = torch.arange(4000) < 1000
    batch.observation.image_mask["front"] = ~lacking  # these only have the wrist's
    found = CameraDropout(probability=0.4)(batch, seed=(0,)).observation
    seen = torch.stack([found.image_mask["front"], found.image_mask["wrist"]])
    assert seen.any(dim=0).all()
    assert not found.image_mask["front"][lacking].any()
    assert found.image_mask["wrist"][lacking].all()
    # One of two is lost where it fails alone, or both fail and it is not the one spared.
    expected = 0.4 * 0.6 + 0.4 * 0.4 / 2
    for name in ("front", "wrist"):
        assert float((~found.image_mask[name][~lacking]).float().mean()) == pytest.approx(expected, abs=0.03)
        assert not found.images[name][~found.image_mask[name]].any()
        assert torch.equal(
            found.images[name][found.image_mask[name]], batch.observation.images[name][found.image_mask[name]]
        )
    assert list(found.image_mask) == list(batch.observation.image_mask)
    only = CameraDropout(probability=1.0, cameras=["wrist"])(batch, seed=(0,)).observation.image_mask
    assert torch.equal(only["front"], ~lacking)
    assert torch.equal(only["wrist"], lacking)


def test_noise_on_vectors_is_in_the_measure_of_each_dimension():
    batch = make_batch(num=4000, steps=2)
    statistics = {"state": {"std": np.array([1.0, 10.0, 5.0])}, "action": {"std": np.array([3.0, 1.0])}}
    state, action = StateNoise(std=0.1), ActionNoise(std=0.2)
    with pytest.raises(ValueError, match="StateNoise has to learn the dataset's statistics first"):
        state(batch, seed=(0,))
    for noise in (state, action):
        noise.learn([SPEC], [statistics])
    moved = state(batch, seed=(0,)).observation.state - batch.observation.state
    torch.testing.assert_close(moved.std(dim=(0, 1)), torch.tensor([0.1, 1.0, 0.0]), rtol=0.05, atol=1e-6)
    moved = action(batch, seed=(0,)).actions - batch.actions
    torch.testing.assert_close(moved.std(dim=(0, 1)), torch.tensor([0.6, 0.0]), rtol=0.05, atol=1e-6)
    assert torch.equal(state(batch, seed=(7,)).observation.state, state(batch, seed=(7,)).observation.state)


def test_noise_knows_which_robot_a_sample_is_of():
    narrow = replace(SPEC, action=SPEC.action[:1])
    batch = make_batch(num=2)
    batch.observation.embodiment = torch.tensor([1, 0])
    noise = ActionNoise(std=1.0, leave=())
    each = [{"action": {"std": np.array([1.0, 1.0])}}, {"action": {"std": np.array([1000.0])}}]
    noise.learn([SPEC, narrow], each)
    moved = (noise(batch, seed=(0,)).actions - batch.actions).abs().amax(dim=1)
    assert moved[0, 0] > 100
    assert moved[0, 1] == 0
    assert moved[1].min() > 0
    assert moved[1].max() < 10


def test_paraphrases():
    step = Paraphrase(
        probability=1.0,
        templates=["{}", "please {}"],
        synonyms={"pick up": ["grasp", "take"], "pick": ["choose"]},
        phrases={"open it": ["pull it open"]},
    )
    assert isinstance(step, Rewriting)
    found = Counter(step.rewrite(["pick up the cube"] * 600, seed=(0,)))
    says = ("pick up", "grasp", "take")
    assert set(found) == {f"{lead}{say} the cube" for lead in ("", "please ") for say in says}
    assert min(found.values()) > 60
    assert set(step.rewrite(["open it"] * 20, seed=(0,))) == {"pull it open"}
    assert "unpicked" in step.rewrite(["unpicked"], seed=(0,))[0]
    assert {"Grasp", "Take", "Pick up"} <= set(step.rewrite(["Pick up"] * 60, seed=(1,)))
    half = Paraphrase(probability=0.5, templates=["please {}"]).rewrite(["go"] * 1000, seed=(2,))
    assert half.count("go") == pytest.approx(500, abs=60)
    assert step.rewrite(["pick up"] * 9, seed=(3,)) == step.rewrite(["pick up"] * 9, seed=(3,))


def test_paraphrases_from_a_file(tmp_path):
    file = tmp_path / "words.yaml"
    file.write_text("synonyms: {cube: [block]}\nphrases: {go: [move]}\n")
    step = Paraphrase(probability=1.0, file=str(file))
    assert set(step.rewrite(["a cube"] * 20, seed=(0,))) == {"a cube", "a block"}
    assert step.rewrite(["go"], seed=(0,)) == ["move"]
    file.write_text("synonym: {cube: [block]}")
    with pytest.raises(LibrobotError, match=r"words.yaml: synonym: did you mean 'synonyms'"):
        Paraphrase(file=str(file))
    file.write_text("- cube")
    with pytest.raises(LibrobotError, match=r"expected the keys templates, synonyms, phrases, found list"):
        Paraphrase(file=str(file))
    with pytest.raises(LibrobotError, match=r"missing.yaml is no readable YAML"):
        Paraphrase(file=str(tmp_path / "missing.yaml"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomCrop(scale=(0.9, 0.1)), "scale must be two ascending numbers in"),
        (lambda: RandomCrop(rotate=270), "rotate must lie in"),
        (lambda: Blur(sigma=(0.0, 1.0)), "sigma must be two ascending numbers"),
        (lambda: Blur(probability=2), "probability must lie in"),
        (lambda: Cutout(count=0), "count must be at least 1"),
        (lambda: Cutout(fill="red"), "fill must be one of black, grey, random"),  # type: ignore[arg-type]
        (lambda: StateNoise(std=-1), "std must lie in"),
        (lambda: Paraphrase(templates=["please"]), r"expected '\{\}' once"),
        (lambda: Paraphrase(synonyms={"cube": "block"}), "synonyms: expected a list of texts for 'cube'"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_builds_and_runs(option):
    node = compose(["data=lerobot", "data.root=none", f"augmentation=[{option}]"]).augmentation
    assert (list(node) if node else []) == ([] if option == "none" else [option])
    for name, item in (node or {}).items():
        step = build(item, name)
        if isinstance(step, Rewriting):
            assert step.rewrite(["go"], seed=(1,))
            continue
        if hasattr(step, "learn"):
            step.learn([SPEC], [{"state": {"std": np.ones(3)}, "action": {"std": np.ones(2)}}])
        found = step(make_batch(), seed=(1,))
        assert found.actions.shape == (8, 5, 2)


def test_options_compose_in_the_order_given():
    node = compose(["data=lerobot", "data.root=none", "augmentation=[cutout,blur]"]).augmentation
    assert list(OmegaConf.to_container(node)) == ["cutout", "blur"]


class Seen(LightningModule):
    """Keeps the batches that it trains and validates on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.training_batches: list[Batch] = []
        self.validation_batches: list[Batch] = []

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        self.training_batches.append(batch)
        return self.layer.weight.sum() * 0.0

    def validation_step(self, batch: Batch, index: int) -> None:
        self.validation_batches.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def words(prompts: list[str], images: Any, state: Any) -> dict[str, torch.Tensor]:
    """A processor: it sees what the policy's tokenizer does."""
    return {"length": torch.tensor([len(prompt) for prompt in prompts])}


def fitted(source: Any, tmp_path: Path, *, workers: int = 0, epochs: int = 2) -> Seen:
    steps = {
        "paraphrase": Paraphrase(probability=0.5, templates=["please {}"]),
        "blur": Blur(probability=1.0),
    }
    module = DataModule(
        source, batch_size=4, val_fraction=0.25, augmentations=steps, num_workers=workers, drop_last=False
    )
    module.configure(horizon=2, make_processor=lambda: words)
    seen = Seen()
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", num_sanity_val_steps=0, default_root_dir=tmp_path, **quiet
    )
    trainer.fit(seen, datamodule=module)
    return seen


@pytest.mark.filterwarnings("ignore")
def test_instructions_change_before_they_are_tokenised_in_training_only(array_source, tmp_path):
    source = array_source([8, 8, 8, 8])
    seen = fitted(source, tmp_path)
    said = [(b.observation.prompt, b.observation.inputs["length"].tolist()) for b in seen.training_batches]
    for prompts, lengths in said:
        assert [len(prompt) for prompt in prompts] == lengths
    every = [prompt for prompts, _ in said for prompt in prompts]
    assert 0 < sum(prompt.startswith("please task") for prompt in every) < len(every)
    assert all(p.startswith("task") for b in seen.validation_batches for p in b.observation.prompt)
    # Another epoch says the same sample otherwise.
    first, second = every[: len(every) // 2], every[len(every) // 2 :]
    assert {p for p in first if "please" in p} != {p for p in second if "please" in p}
    again = fitted(source, tmp_path, workers=1)
    assert [b.observation.prompt for b in again.training_batches] == [p for p, _ in said]
