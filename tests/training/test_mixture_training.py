"""Training on two datasets of different robots, from the command line's overrides to the policy."""

from pathlib import Path

import numpy as np
import pytest
from omegaconf import open_dict
from small_runs import losses, rows, tiny

from librobot.config.compose import compose, read, write
from librobot.data.writer import LeRobotWriter
from librobot.errors import LibrobotError
from librobot.policy import Policy
from librobot.training.launch import place
from librobot.training.run import run
from librobot.types import Camera, Dim, RobotSpec

CART = RobotSpec(
    "cart",
    (Camera("front", 24, 24), Camera("wrist", 32, 32)),
    (Dim("p"),),
    tuple(Dim(name) for name in ("u", "v", "w")),
    10.0,
)


@pytest.fixture(scope="module")
def cart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random, root = np.random.default_rng(1), tmp_path_factory.mktemp("cart") / "cart"
    with LeRobotWriter(root, CART, fps=10) as writer:
        for _ in range(3):
            sizes = {camera.name: camera.height for camera in CART.cameras}
            writer.add_episode(
                images={n: random.integers(0, 255, (8, s, s, 3), dtype=np.uint8) for n, s in sizes.items()},
                state=random.normal(size=(8, 1)).astype(np.float32),
                action=random.normal(5, 2, size=(8, 3)).astype(np.float32),
                task="push",
            )
    return root


WEIGHTS = "data.source.weights={stick: 3, cart: 1}"


def fit(stick: Path, cart: Path, run_dir: Path, *overrides: str) -> dict[str, float]:
    datasets = [
        "+data@data.source.datasets.stick=lerobot",
        f"data.source.datasets.stick.root={stick}",
        "+data@data.source.datasets.cart=lerobot",
        f"data.source.datasets.cart.root={cart}",
    ]
    cfg = compose([*tiny(), "data=mixture", *datasets, f"run_dir={run_dir}", "name=tiny", *overrides])
    with open_dict(cfg):
        place(cfg)
    return run(read(write(cfg, run_dir / "config.yaml")))


def test_one_policy_for_two_robots(dataset: Path, cart: Path, tmp_path: Path) -> None:
    """An epoch is 48 + 16 samples: the shares are exact where it ends."""
    parts = ["callbacks=[default,statistics]", "callbacks.losses.every_n_steps=4"]
    parts += ["callbacks.activations=null", "framework.loss_reduction=masked"]
    metrics = fit(dataset, cart, tmp_path / "whole", WEIGHTS, "trainer.max_steps=16", *parts)
    for name, dims in (("stick", "xy"), ("cart", "uvw")):
        loss = metrics[f"train/robot_loss/{name}"]
        assert loss == pytest.approx(metrics[f"train/dataset_loss/{name}"])
        assert loss == pytest.approx(np.mean([metrics[f"train/dim_loss/{name}/{dim}"] for dim in dims]))
    assert (metrics["data/share/stick"], metrics["data/share/cart"]) == (0.75, 0.25)
    assert float(rows(tmp_path / "whole")[-1]["data/share/cart"]) == 0.25

    masked = parts[-1]
    fit(dataset, cart, tmp_path / "cut", WEIGHTS, masked, "trainer.max_steps=5")
    metrics = fit(dataset, cart, tmp_path / "cut", WEIGHTS, masked, "trainer.max_steps=16", "ckpt=last")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert metrics["data/share/cart"] == 0.25

    policy = Policy.from_checkpoint(tmp_path / "whole", device="cpu")
    picture = np.zeros((32, 32, 3), np.uint8)
    for name, state, width in (("stick", 2, 2), ("cart", 1, 3)):
        images = dict.fromkeys(("front",) if name == "stick" else ("front", "wrist"), picture)
        observation = {
            "images": images,
            "state": np.zeros(state, np.float32),
            "prompt": "push",
            "robot": name,
        }
        actions = policy.infer(observation)["actions"]
        assert actions.shape == (4, width)
        assert np.isfinite(actions).all()
    assert abs(actions.mean() - 5) < 3  # the cart's own statistics


def test_an_experiment_names_its_datasets(dataset: Path, cart: Path, tmp_path: Path) -> None:
    """As docs/data.md shows it."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/both.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n"
        "  - /data@data.source.datasets.arm: lerobot\n"
        "  - /data@data.source.datasets.bench: libero\n"
        "  - override /data: mixture\n"
        "  - _self_\n"
        "data:\n"
        "  source:\n"
        "    datasets: {arm: {root: /a}, bench: {root: /b}}\n"
        "    fields: {bench: {cameras: {front: agentview}}}\n"
    )
    cfg = compose([f"hydra.searchpath=[file://{tmp_path}]", "experiment=both"])
    datasets = cfg.data.source.datasets
    assert (datasets.arm.source.root, datasets.bench.source.root) == ("/a", "/b")
    assert datasets.bench.source.layout == "libero"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.source.weights={stick: 3, carts: 1}", r"weights.carts: did you mean 'cart'"),
        (
            "+data.source.datasets.stick.sorce=1",
            r"data.source.datasets.stick.sorce: DataModule has no argument",
        ),
        ("data.source.fields={carts: {}}", r"fields.carts: did you mean 'cart'"),
    ],
)
def test_mistakes_are_named(dataset: Path, cart: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(LibrobotError, match=message):
        fit(dataset, cart, tmp_path, override)
