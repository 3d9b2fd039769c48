"""librobot-train: train a policy."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from librobot.cli.app import start, task
from librobot.cli.flags import flag

ASKED: dict[str, str] = {}
"""What the command line asks for in the place of training: see `librobot.training.instead`."""


@hydra.main(config_path="pkg://librobot.conf", config_name="train", version_base="1.3")
@task
def train(cfg: DictConfig) -> float | None:
    from librobot.training.launch import launch

    if ASKED:
        from librobot.training.instead import instead

        instead(cfg, **ASKED)
        return None
    return launch(cfg)


def main() -> None:
    ASKED.update(flag("--estimate", "--find-batch-size", "--find-lr", options=("--devices", "--mfu")))
    start(train, "train")


if __name__ == "__main__":
    main()
