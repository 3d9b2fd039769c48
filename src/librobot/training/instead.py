"""What librobot-train does in the place of training: --estimate, --find-batch-size, --find-lr."""

from __future__ import annotations

from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from librobot.config.compose import resolve
from librobot.config.schema import TrainConfig, check_root
from librobot.errors import LibrobotError
from librobot.training.estimates.chips import parse_devices


def instead(cfg: DictConfig, what: str, devices: str | None = None, mfu: str | None = None) -> None:
    """Do `what` (estimate, find_batch_size, find_lr). `devices` and `mfu` are options of the estimate."""
    check_root(cfg, TrainConfig)
    with open_dict(cfg):
        cfg.name = cfg.name or HydraConfig.get().runtime.choices["framework"]
    if what != "estimate" and (devices or mfu):
        raise LibrobotError("--devices and --mfu: expected beside --estimate")
    if what == "estimate":
        print_estimate(cfg, devices, mfu)
        return
    from librobot.training.finders import find
    from librobot.training.launch import place

    with open_dict(cfg):
        place(cfg)
    find(settled(cfg), what)


def print_estimate(cfg: DictConfig, devices: str | None, mfu: str | None) -> None:
    from librobot.training.estimates import estimate, report

    with open_dict(cfg):
        cfg.run_dir = cfg.run_dir or "outputs/train"  # nothing is written
    made = settled(cfg)
    chips = None if devices is None else parse_devices(devices)
    assumed = estimate.ASSUMED_MFU if mfu is None else share(mfu)
    found = estimate.estimate(made, chips, assumed, process=True)
    report.print_estimate(found, made)


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise LibrobotError(f"--mfu {text}: expected a share of the device's peak, above 0 and at most 1")
    return value


def settled(cfg: DictConfig) -> Any:
    """The configuration without interpolations, in struct mode."""
    made = OmegaConf.create(resolve(cfg))
    OmegaConf.set_struct(made, True)
    return made
