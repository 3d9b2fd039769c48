"""librobot-eval: measure a checkpoint's success in simulation."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from librobot.checkpoint_path import checkpoint_file
from librobot.cli.app import start, task


@hydra.main(config_path="pkg://librobot.conf", config_name="eval", version_base="1.3")
@task
def evaluate(cfg: DictConfig) -> None:
    if cfg.policy == "checkpoint" and cfg.ckpt:
        checkpoint_file(cfg.ckpt)
    from librobot.config.check import check
    from librobot.config.schema import EvalConfig

    check(cfg, EvalConfig)
    from librobot.evaluation import run

    run.evaluate(cfg)


def main() -> None:
    start(evaluate, "eval")


if __name__ == "__main__":
    main()
