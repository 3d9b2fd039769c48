"""librobot-record: record a scripted expert's demonstrations."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from librobot.cli.app import start, task


@hydra.main(config_path="pkg://librobot.conf", config_name="record", version_base="1.3")
@task
def record(cfg: DictConfig) -> None:
    from librobot.config.check import check
    from librobot.config.schema import RecordConfig

    check(cfg, RecordConfig)
    from librobot.sim import record as recording

    recording.record(cfg)


def main() -> None:
    start(record, "record")


if __name__ == "__main__":
    main()
