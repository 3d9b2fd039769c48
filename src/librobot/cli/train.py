"""librobot-train: train a policy."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from librobot.cli.app import start, task


@hydra.main(config_path="pkg://librobot.conf", config_name="train", version_base="1.3")
@task
def train(cfg: DictConfig) -> float | None:
    from librobot.training.launch import launch

    return launch(cfg)


def main() -> None:
    start(train, "train")


if __name__ == "__main__":
    main()
