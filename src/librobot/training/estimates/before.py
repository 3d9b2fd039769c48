"""Before a run: does its batch fit? Asked where it could matter, and never a reason not to start."""

from __future__ import annotations

import warnings

import torch
from omegaconf import DictConfig

from librobot.frameworks.base import Framework
from librobot.training.estimates.chips import Chip, host_memory
from librobot.training.estimates.estimate import ASSUMED_MFU, estimate, number_of_devices, runs_on_cpu
from librobot.training.estimates.report import warnings_of

STATES_MATTER = 0.1
"""On a CPU a step is estimated where weights, gradients and moments take this share of the free memory."""


def warn_of_misfit(cfg: DictConfig, framework: Framework) -> None:
    """Warn where a step of the run would take more memory than there is, and say which options help."""
    here = chip_of(cfg.trainer)
    if runs_on_cpu(cfg.trainer) and states(framework) < STATES_MATTER * here.memory * 1e9:
        return
    try:
        found = estimate(cfg, [(here, number_of_devices(cfg.trainer))], ASSUMED_MFU)
    except Exception as error:  # an estimate is an extra: whatever it cannot do, training may
        warnings.warn(f"the memory of a step could not be estimated: {error}", stacklevel=2)
        return
    for sentence in warnings_of(found, cfg):
        warnings.warn(sentence, stacklevel=2)


def chip_of(trainer: DictConfig) -> Chip:
    """What a run of this trainer computes on here, with the memory that nobody else has taken."""
    if runs_on_cpu(trainer):
        return Chip("cpu", host_memory(), None, None, None)
    free, _ = torch.cuda.mem_get_info()
    return Chip(torch.cuda.get_device_name(), free / 1e9, None, None, None)


def states(framework: Framework) -> int:
    """Bytes of weights, gradients and two moments in 32 bits."""
    held = sum(p.numel() * p.element_size() for p in framework.parameters())
    trained = sum(p.numel() for p in framework.parameters() if p.requires_grad)
    return held + 12 * trained
